"""A symmetric matrix that is a diagonal less a rank-one term, as its vectors: it is never formed.

The second moment of one-hot inputs is the diagonal of how often each word occurs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Diagonal:
    """``diag(values) - vector vector^T``, ``(..., n, n)``, with what methods ask of a dense matrix.

    Attributes:
        values: ``(..., n)``.
        vector: ``(..., n)``; None for zero.
    """

    def __init__(self, values: Tensor, vector: Tensor | None = None) -> None:
        self.values, self.vector = values, vector

    @property
    def shape(self) -> torch.Size:
        """``(..., n, n)``."""
        return torch.Size((*self.values.shape, self.values.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        """Whether on a CUDA device."""
        return self.values.is_cuda

    @property
    def mT(self) -> Diagonal:
        """Itself: it is symmetric."""
        return self

    def dim(self) -> int:
        """Number of dimensions of the matrix."""
        return self.values.dim() + 1

    def numel(self) -> int:
        """How many numbers it is made of."""
        return self.values.numel()

    def stride(self, dim: int) -> int:
        """Of a leading dimension; zero where it is expanded."""
        return self.values.stride(dim)

    def diagonal(self, dim1: int = -2, dim2: int = -1) -> Tensor:
        """``(..., n)``."""
        del dim1, dim2
        return self.values if self.vector is None else self.values - self.vector.square()

    def minus_outer(self, vector: Tensor) -> Diagonal:
        """Less ``vector vector^T`` for a ``(..., n)``."""
        return Diagonal(self.values, vector)

    def to(self, *args: Any, **kwargs: Any) -> Diagonal:
        """As ``Tensor.to``."""
        return self._each(lambda t: t.to(*args, **kwargs))

    def double(self) -> Diagonal:
        """In float64."""
        return self._each(lambda t: t.double())

    def float(self) -> Diagonal:
        """In float32."""
        return self._each(lambda t: t.float())

    def cpu(self) -> Diagonal:
        """On the CPU."""
        return self._each(lambda t: t.cpu())

    def clone(self) -> Diagonal:
        """With numbers of its own."""
        return self._each(lambda t: t.clone())

    def dense(self) -> Tensor:
        """The matrix itself, for what is small."""
        out = torch.diag_embed(self.values)
        if self.vector is None:
            return out
        return out - self.vector.unsqueeze(-1) * self.vector.unsqueeze(-2)

    def matmul(self, block: Tensor) -> Tensor:
        """The matrix times ``(..., n, k)``."""
        out = self.values.unsqueeze(-1) * block
        if self.vector is None:
            return out
        return out - self.vector.unsqueeze(-1) * (self.vector.unsqueeze(-2) @ block)

    __matmul__ = matmul

    def __rmatmul__(self, block: Tensor) -> Tensor:
        return self.matmul(block.mT).mT

    def __truediv__(self, number: Any) -> Diagonal:
        return self._each(lambda t: t / number)

    def _each(self, change: Any) -> Diagonal:
        return Diagonal(change(self.values), None if self.vector is None else change(self.vector))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            return args[1].__rmatmul__(args[0])
        if func is torch.linalg.vector_norm and args[0].vector is None:
            return func(args[0].values, *args[1:], **kwargs)
        if func is torch.cholesky_solve:
            return args[0] / args[1].values.square().unsqueeze(-1)
        if func is torch.cholesky_inverse:
            return torch.diag_embed(args[0].values.square().reciprocal())
        if func in (torch.Tensor.to, torch.Tensor.new_tensor) and isinstance(args[1], Diagonal):
            return func(args[0], args[1].values, *args[2:], **kwargs)
        return NotImplemented
