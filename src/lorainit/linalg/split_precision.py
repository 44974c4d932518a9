"""Products of large matrices on an accelerator's matrix units, nearly as exact as float32.

A float32 matrix is written as the sum of two in half precision, 22 of its 24 digits: as many bytes, and
multiplied several times as quickly, since products of half precision are exact and summed in float32.
The scale keeps the largest entry at 1024, so that what is 1e-7 times as small loses no digits, and
nothing more than ``2^-35`` of the largest. (Markidis et al., IPDPS workshops 2018, arXiv 1803.04014;
Ootomo, Yokota, IJHPCA 2022, arXiv 2203.03341.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorainit.linalg.thresholds import on_matrix_units

LARGEST = 1024.0
"""Of a matrix's entries, where it is split."""

_SLAB = 2**24
"""Numbers that are split at once."""


class SplitMatrix(NamedTuple):
    """A stack of matrices in two parts.

    Attributes:
        parts: ``(batch, 2 m, n)`` float16, the leading digits above, what is left of them below.
        scale: ``(batch, 1, 1)`` float32.
        number: how many blocks are multiplied by each matrix; ``(..., number, n, width)`` then.
    """

    parts: Tensor
    scale: Tensor
    number: int = 1

    @classmethod
    def of(cls, matrix: Tensor) -> SplitMatrix:
        """Of ``(..., m, n)``; of one only, where it is expanded over the last leading dimension."""
        narrow, number = narrowed(matrix)
        wide = torch.promote_types(narrow.dtype, torch.float32)
        scale = largest(narrow, (-2, -1)).to(wide) / LARGEST
        batch, rows, columns = narrow.shape
        parts = narrow.new_empty(batch, 2, rows, columns, dtype=torch.float16)
        split_into(narrow, scale.reciprocal(), parts[:, 0], parts[:, 1])
        return cls(parts.flatten(1, 2), scale.float(), number)

    @property
    def leading(self) -> Leading:
        """The leading digits by themselves, in the same memory."""
        return Leading(self.parts[:, : self.parts.shape[1] // 2], self.scale, self.number)

    def times(self, block: Tensor) -> Tensor:
        """``M @ block`` for ``(..., n, width)``, float32."""
        right = concatenate_columns(block.float(), self.number)
        batch, rows, width = right.shape
        size = largest(right, (-2,)) / LARGEST
        digits = right.new_empty(batch, rows, 2, width, dtype=torch.float16)
        split_into(right, size.reciprocal(), digits[:, :, 0], digits[:, :, 1])
        found = multiply(self.parts, digits.flatten(2))
        found = found.reshape(batch, 2, -1, 2, width).sum((1, 3))
        return split_columns(found.mul_(size * self.scale), block)

    def transposed_times(self, block: Tensor) -> Tensor:
        """``M^T @ block`` for ``(..., m, width)``, float32."""
        right = concatenate_columns(block.float(), self.number)
        batch, rows, width = right.shape
        size = largest(right, (-2,)) / LARGEST
        digits = right.new_empty(batch, 2, rows, 2, width, dtype=torch.float16)
        split_into(right, size.reciprocal(), digits[:, 0, :, 0], digits[:, 0, :, 1])
        digits[:, 1] = digits[:, 0]
        found = multiply(self.parts.mT, digits.flatten(3).flatten(1, 2))
        found = found.reshape(batch, -1, 2, width).sum(2)
        return split_columns(found.mul_(size * self.scale), block)


class Leading(NamedTuple):
    """The leading eleven digits of a stack of matrices: half the bytes of both, products 1e-4 off.

    Attributes:
        part: ``(batch, m, n)`` float16.
        scale: ``(batch, 1, 1)`` float32.
        number: as of `SplitMatrix`.
    """

    part: Tensor
    scale: Tensor
    number: int = 1

    def times(self, block: Tensor) -> Tensor:
        """``M @ block`` for ``(..., n, width)``, float32."""
        return self._product(self.part, block)

    def transposed_times(self, block: Tensor) -> Tensor:
        """``M^T @ block`` for ``(..., m, width)``, float32."""
        return self._product(self.part.mT, block)

    def gram_times(self, block: Tensor) -> Tensor:
        """``M^T M @ block`` for ``(..., n, width)``, float32."""
        return self.transposed_times(self.times(block))

    def _product(self, left: Tensor, block: Tensor) -> Tensor:
        right = concatenate_columns(block.float(), self.number)
        size = largest(right, (-2,)) / LARGEST
        found = multiply(left, (right / size).half())
        return split_columns(found.mul_(size * self.scale), block)


def split_into(matrix: Tensor, factor: Tensor, high: Tensor, low: Tensor) -> None:
    """Leading and remaining digits of ``matrix * factor`` into float16 tensors of its shape.

    Slab by slab, so that a large stack needs no other float32 copy.

    Args:
        matrix: ``(batch, rows, columns)``, of any floating dtype.
        factor: ``(batch, 1, 1)`` or ``(batch, 1, columns)``.
        high: as `matrix`, float16.
        low: as `matrix`, float16.
    """
    batch, rows, columns = matrix.shape
    step = max(1, _SLAB // max(1, columns))
    together = max(1, step // max(1, rows))
    for first in range(0, batch, together):
        own = slice(first, first + together)
        for top in range(0, rows, step):
            place = own, slice(top, top + step)
            scaled = matrix[place] * factor[own]
            high[place] = scaled
            # One dtype in, one out: a device's mixed arithmetic is several times slower.
            low[place] = scaled.sub_(high[place].to(scaled.dtype))


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two stacks in half precision, summed and given in float32."""
    if left.is_cuda:
        found: Tensor = torch.bmm(left, right, out_dtype=torch.float32)
        return found
    return left.float() @ right.float()


def accumulate(total: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
    """Add ``weight * left @ right`` to a float32 stack in place: two stacks in half precision."""
    if left.is_cuda:
        torch.baddbmm(total, left, right, out_dtype=torch.float32, alpha=weight, out=total)
    else:
        total.add_(left.float() @ right.float(), alpha=weight)


def product_in_halves(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of float32 stacks, by products in halves."""
    sizes, digits = [], []
    for matrix in (left, right):
        size = largest(matrix, (-2, -1)) / LARGEST
        pair = matrix.new_empty(2, *matrix.shape, dtype=torch.float16)
        split_into(matrix, size.reciprocal(), pair[0], pair[1])
        sizes.append(size)
        digits.append(pair)
    (a, b), (c, d) = digits
    found = multiply(a, c)
    accumulate(found, a, d)
    accumulate(found, b, c)
    return found.mul_(sizes[0] * sizes[1])


def whole_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two stacks of large matrices: of float32 on matrix units by products in halves.

    Args:
        left: ``(..., m, k)``.
        right: ``(..., k, n)``, in the dtype of `left`; expanded over the last leading dimension where one is
            meant for several.
    """
    if not on_matrix_units(left):
        return left @ right
    narrow, _ = narrowed(right)
    found = product_in_halves(left.reshape(len(narrow), -1, left.shape[-1]), narrow)
    return found.reshape(*left.shape[:-1], right.shape[-1])


def narrowed(matrix: Tensor) -> tuple[Tensor, int]:
    """``(batch, m, n)``, and over how many blocks each of them is expanded."""
    if matrix.dim() == 4 and matrix.stride(1) == 0 and matrix.shape[1] > 1:
        return matrix[:, 0], matrix.shape[1]
    return matrix.reshape(-1, *matrix.shape[-2:]), 1


def concatenate_columns(block: Tensor, number: int) -> Tensor:
    """Blocks ``(..., number, n, width)`` of one matrix side by side: ``(batch, n, number * width)``."""
    rows, width = block.shape[-2:]
    if number == 1:
        return block.reshape(-1, rows, width)
    return block.transpose(1, 2).reshape(len(block), rows, number * width)


def split_columns(found: Tensor, like: Tensor) -> Tensor:
    """The inverse of `concatenate_columns`, with the leading dimensions of `like`."""
    rows, width = found.shape[-2], like.shape[-1]
    if found.shape[-1] == width:
        return found.reshape(*like.shape[:-2], rows, width)
    return found.reshape(len(like), rows, -1, width).transpose(1, 2)


def largest(matrix: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Largest absolute values along `dims`, which are kept; never zero."""
    found: Tensor = torch.linalg.vector_norm(matrix, ord=torch.inf, dim=dims, keepdim=True)
    return found.clamp_min(1e-30)
