"""The Kronecker metric of one layer: what a step costs in the predictions, and low-rank cuts in it.

Under the K-FAC Fisher a step ``Delta`` costs ``|Y^(1/2) Delta X^(1/2)|_F^2 / 2``. In whitened
coordinates ``Ly^T Delta Lx``, with Cholesky roots ``X = Lx Lx^T`` and ``Y = Ly Ly^T``, that is a plain
Frobenius norm, so the best cut of a sum of steps to rank r is the SVD there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.linalg.triangle import Triangle


@dataclass(frozen=True, eq=False)
class KroneckerMetric:
    """Lower Cholesky roots of both damped second moments.

    Attributes:
        x_root: ``(..., in, in)``, ``Lx``.
        y_root: ``(..., out, out)``, ``Ly``.
    """

    x_root: Tensor
    y_root: Tensor

    @cached_property
    def x_triangle(self) -> Triangle:
        """``Lx``, ready for substitution."""
        return Triangle(self.x_root)

    @cached_property
    def y_triangle(self) -> Triangle:
        """``Ly``, ready for substitution."""
        return Triangle(self.y_root)

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """``Ly^-1 G Lx^-T``: a gradient, ``(..., out, in)``, in whitened coordinates.

        In float64; a float32 gradient on CUDA in float32, by products as exact as that: substitution
        multiplies rounding by what damping leaves of the roots' condition at most, and by far less in
        the directions that a cut keeps.
        """
        if linalg.on_matrix_units(gradient):
            half = self.y_triangle.solve_quickly(gradient)
            return self.x_triangle.solve_quickly(half.mT).mT.contiguous()
        wide = linalg.double_precision(gradient)
        half = linalg.solve_triangular(self.y_root, wide, upper=False)
        return linalg.solve_triangular(self.x_root.mT, half, upper=True, left=False)

    def into(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """A displacement ``left right`` in whitened coordinates, ``Ly^T left`` and ``right Lx``."""
        return self.y_root.mT @ left, right @ self.x_root

    def out_of(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Back from whitened coordinates: ``Ly^-T left`` and ``right Lx^-1``."""
        return (
            self.y_triangle.solve_transposed(left),
            self.x_triangle.solve_transposed(right.mT).mT,
        )


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
    def in_metric(cls, metric: KroneckerMetric, left: Tensor, right: Tensor) -> LowRankSum:
        """The terms, measured in this metric."""
        white_left, white_right = metric.into(left, right)
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
        u, s, v = linalg.svd(core)
        u, s, v = u[..., :rank], s[..., :rank], v[..., :rank]
        left = self.left @ (self.left_inverse @ (u * s.unsqueeze(-2)))
        return left, (self.right_inverse @ v).mT @ self.right


def _root_of_gram(block: Tensor) -> tuple[Tensor, Tensor]:
    """``R`` ``(..., k, k)`` with ``block = Q R`` for some orthonormal ``Q``, and its pseudoinverse."""
    gram = block.mT @ block
    limits = torch.finfo(block.dtype)
    # At unit length, short terms beside long ones are more than rounding.
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(limits.tiny**0.5)
    values, vectors = linalg.eigh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    # Terms that repeat one another leave zeros: they count as nothing.
    real = values > block.shape[-1] * limits.eps * values[..., -1:]
    sizes = torch.where(real, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(real, 1 / sizes.clamp_min(limits.tiny), torch.zeros_like(sizes))
    root = sizes.unsqueeze(-1) * vectors.mT * lengths.unsqueeze(-2)
    return root, vectors * inverse.unsqueeze(-2) / lengths.unsqueeze(-1)
