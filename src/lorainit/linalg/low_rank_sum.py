"""Sums of weighted rank-one terms, cut to a rank where a metric feels the cut least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit.linalg.dense import eigh, svd
from lorainit.types import Metric


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """A sum of weighted rank-one terms ``left[:, k] weight[k] right[k]``, ready to be cut again and again.

    Whatever the weights, the terms span one small space: their Gram matrices in the metric are taken
    once, and a cut then costs an SVD as small as there are terms.

    Attributes:
        left: ``(..., out, k)``, not whitened.
        right: ``(..., k, in)``, not whitened.
        left_root: ``(..., k, k)``, ``Rl`` with ``Ly^T left = Ql Rl`` for orthonormal ``Ql``.
        left_inverse: its pseudoinverse.
        right_root: the same of ``(right Lx)^T``.
        right_inverse: its pseudoinverse.
    """

    left: Tensor
    right: Tensor
    left_root: Tensor
    left_inverse: Tensor
    right_root: Tensor
    right_inverse: Tensor

    @classmethod
    def in_metric(cls, metric: Metric | None, left: Tensor, right: Tensor) -> LowRankSum:
        """The terms, measured in this metric; None: the Frobenius norm."""
        white_left, white_right = (left, right) if metric is None else metric.into(left, right)
        return cls(left, right, *_root_of_gram(white_left), *_root_of_gram(white_right.mT))

    def cut(self, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of rank `rank` in the metric (Eckart, Young).

        Args:
            weights: ``(k,)`` or ``(..., k)``.
            rank: of the result.

        Returns:
            ``(..., out, rank)`` and ``(..., rank, in)``, not whitened, strongest first.
        """
        core = (self.left_root * weights.unsqueeze(-2)) @ self.right_root.mT
        u, s, v = svd(core)
        u, s, v = u[..., :rank], s[..., :rank], v[..., :rank]
        left = self.left @ (self.left_inverse @ (u * s.unsqueeze(-2)))
        return left, (self.right_inverse @ v).mT @ self.right


def _root_of_gram(block: Tensor) -> tuple[Tensor, Tensor]:
    """``R`` ``(..., k, k)`` with ``block = Q R`` for some orthonormal ``Q``, and its pseudoinverse."""
    gram = block.mT @ block
    limits = torch.finfo(block.dtype)
    # At unit length, short terms beside long ones are more than rounding.
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(limits.tiny**0.5)
    values, vectors = eigh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    # Terms that repeat one another leave zeros: they count as nothing.
    real = values > block.shape[-1] * limits.eps * values[..., -1:]
    sizes = torch.where(real, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(real, 1 / sizes.clamp_min(limits.tiny), torch.zeros_like(sizes))
    root = sizes.unsqueeze(-1) * vectors.mT * lengths.unsqueeze(-2)
    return root, vectors * inverse.unsqueeze(-2) / lengths.unsqueeze(-1)
