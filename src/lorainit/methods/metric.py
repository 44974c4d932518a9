"""The Kronecker metric of one layer: what a step costs in the predictions.

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
from lorainit.linalg.triangular import DiagonalTriangle, Triangle, triangle_of
from lorainit.types import DampingMode, LayerStatistics


@dataclass(frozen=True, eq=False)
class KroneckerMetric:
    """Lower Cholesky roots of both damped second moments.

    Attributes:
        x_root: ``(..., in, in)``, ``Lx``.
        y_root: ``(..., out, out)``, ``Ly``.
    """

    x_root: Tensor
    y_root: Tensor

    @classmethod
    def damped(
        cls, statistics: LayerStatistics, damping: float, mode: DampingMode
    ) -> KroneckerMetric:
        """Of both second moments, damped, in float64 where the device has it.

        Args:
            statistics: of one layer or a stack of layers.
            damping: of each factor, see `lorainit.linalg.damping_value`.
            mode: of the damping.
        """
        inputs, outputs = statistics.input_second_moment, statistics.output_second_moment
        return cls(
            linalg.damped_root(inputs, damping, mode, "the input second moment"),
            linalg.damped_root(outputs, damping, mode, "the output second moment"),
        )

    @cached_property
    def x_triangle(self) -> Triangle | DiagonalTriangle:
        """``Lx``, ready for substitution."""
        return triangle_of(self.x_root)

    @cached_property
    def y_triangle(self) -> Triangle:
        """``Ly``, ready for substitution."""
        return Triangle(self.y_root)

    def whiten_gradient(self, gradient: Tensor) -> Tensor:
        """``Ly^-1 G Lx^-T``: a gradient, ``(..., out, in)``, in whitened coordinates.

        A float32 gradient in float32, on CUDA by products as exact as that, others in float64: substitution
        multiplies rounding by what damping leaves of the roots' condition at most, and by far less in
        the directions that a cut keeps.
        """
        if linalg.on_matrix_units(gradient):
            half = self.y_triangle.solve_quickly(gradient)
            return self.x_triangle.solve_quickly(half.mT).mT.contiguous()
        single = gradient.dtype == torch.float32
        wide = gradient if single else linalg.double_precision(gradient)
        half = linalg.solve_triangular(self.y_root.to(wide), wide, upper=False)
        return linalg.solve_triangular(self.x_root.to(wide).mT, half, upper=True, left=False)

    def into(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """A displacement ``left right`` in whitened coordinates, ``Ly^T left`` and ``right Lx``."""
        return self.y_root.mT @ left, right @ self.x_root

    def out_of(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Back from whitened coordinates: ``Ly^-T left`` and ``right Lx^-1``."""
        return (
            self.y_triangle.solve_transposed(left),
            self.x_triangle.solve_transposed(right.mT).mT,
        )
