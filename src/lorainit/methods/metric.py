"""The Kronecker metric of one layer: what a step costs in the predictions, and low-rank cuts in it.

Under the K-FAC Fisher a step ``Delta`` costs ``|Y^(1/2) Delta X^(1/2)|_F^2 / 2``. In whitened
coordinates ``Ly^T Delta Lx``, with Cholesky roots ``X = Lx Lx^T`` and ``Y = Ly Ly^T``, that is a plain
Frobenius norm, so the best cut of a sum of steps to rank r is the SVD there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit import linalg


@dataclass(frozen=True, eq=False)
class KroneckerMetric:
    """Lower Cholesky roots of both damped second moments.

    Attributes:
        x_root: ``(..., in, in)``, ``Lx``.
        y_root: ``(..., out, out)``, ``Ly``.
    """

    x_root: Tensor
    y_root: Tensor

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """``Ly^-1 G Lx^-T``: a gradient, ``(..., out, in)``, in whitened coordinates."""
        half = linalg.solve_triangular(self.y_root, gradient, upper=False)
        return linalg.solve_triangular(self.x_root.mT, half, upper=True, left=False)

    def into(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """A displacement ``left right`` in whitened coordinates, ``Ly^T left`` and ``right Lx``."""
        return self.y_root.mT @ left, right @ self.x_root

    def out_of(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Back from whitened coordinates: ``Ly^-T left`` and ``right Lx^-1``."""
        return (
            linalg.solve_triangular(self.y_root.mT, left, upper=True),
            linalg.solve_triangular(self.x_root, right, upper=False, left=False),
        )


def cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of ``left right`` of rank `rank`, in the Frobenius norm.

    Args:
        left: ``(..., m, k)``.
        right: ``(..., k, n)``, ``k`` small.
        rank: of the result.

    Returns:
        ``(..., m, rank)`` and ``(..., rank, n)``, the latter with orthonormal rows.
    """
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.mT)
    u, s, v = linalg.svd(left_triangle @ right_triangle.mT)
    kept = slice(None, rank)
    return (
        left_basis @ (u[..., kept] * s[..., None, kept]),
        (right_basis @ v[..., kept]).mT,
    )
