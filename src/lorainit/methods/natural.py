"""Natural: the best rank-r natural-gradient step under the Kronecker-factored Fisher.

Of this package. The Fisher factors are K-FAC's (Martens, Grosse, ICML 2015, arXiv 1503.05671), the
rank-r cut is Eckart-Young in their metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_damping, require_number
from lorainit.types import DampingMode, Factors, LayerStatistics


@dataclass(frozen=True)
class Natural:
    r"""A preconditioned gradient step, cut to rank r where the predictions feel the cut least.

    With ``X = Sx + lambda_x I`` and ``Y = Sy + lambda_y I``, among all steps of rank ``rank``
    ``Delta`` minimises the quadratic model ``<G, Delta> + |Y^(1/2) Delta X^(1/2)|_F^2 / 2``::

        M     = -Y^(-1/2) G X^(-1/2) = U S V^T,  its first `rank` triplets kept
        Delta =  Y^(-1/2) U S V^T X^(-1/2)

    Roots are Cholesky factors: another root turns ``M`` by orthogonal matrices on both sides and
    leaves ``Delta`` as it is. Then ``s B A = length * Delta``, with the rows of ``A`` the right
    singular vectors of ``Delta`` times `row_norm`. Not anchored: the model starts displaced.

    Args:
        damping: added to the diagonals of both factors, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of each factor's own diagonal; ``"absolute"``:
        as
            it is, for both.
        row_norm: norm of every row of ``A``. An optimizer like Adam moves both factors by like
            amounts, so it sets how fast the subspace turns beside how fast its content changes; the
            default is the norm of a default LoRA row.
        length: ``s B A`` in units of ``Delta``. None: to be found by calibration; `solve` then
        gives
            one ``Delta``, which only a search may use as it is: the unit follows the loss reduction
            (a loss ``c`` times larger makes ``Delta`` ``1 / c`` times as long), and the layers'
            steps, right one by one, add up.
    """

    damping: float = 0.01
    damping_mode: DampingMode = "relative"
    row_norm: float = 3**-0.5
    length: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset(
        {"gradient", "input_second_moment", "output_second_moment"}
    )

    def __post_init__(self) -> None:
        require_damping(self.damping, self.damping_mode)
        require_number("row_norm", self.row_norm, inclusive=False)
        if self.length is not None:
            require_number("length", self.length, inclusive=False)

    @classmethod
    def paper(cls) -> Natural:
        """The defaults: the method is this package's own."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: with ``gradient`` and both second moments in full.
            rank: of the step.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)`` with orthogonal rows of norm `row_norm`, ``B``
            ``(..., out, rank)`` with orthogonal columns, longest first; not anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        dtype = linalg.compute_dtype(weight, statistics.gradient)
        whitened, x_root, y_root = self._whiten(statistics)
        u, s, v = (part.to(x_root) for part in linalg.top_singular(-whitened.to(dtype), rank))
        left = torch.linalg.solve_triangular(y_root.mT, u * s.unsqueeze(-2), upper=True)
        right = torch.linalg.solve_triangular(x_root.mT, v, upper=True)
        rows, content = linalg.orthonormal_rows(left, right)
        size = (1.0 if self.length is None else self.length) / (self.row_norm * scaling)
        a = (rows * self.row_norm).to(device=weight.device, dtype=dtype)
        b = (content * size).to(device=weight.device, dtype=dtype)
        return Factors(a, b, anchored=False)

    def singular_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """Leading singular values of ``M``: what a direction is worth, comparable across layers.

        Half the square is the decrease that the quadratic model promises for the direction.

        Args:
            statistics: of one layer or a stack of layers, as `solve` takes them.
            max_rank: how many, at most ``min(out, in)``.

        Returns:
            ``(..., max_rank)``, descending.
        """
        linalg.check_rank(max_rank, *statistics.gradient.shape[-2:])
        dtype = linalg.compute_dtype(statistics.gradient)
        return linalg.top_singular(self._whiten(statistics)[0].to(dtype), max_rank)[1]

    def _whiten(self, statistics: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """``Ly^-1 G Lx^-T`` ``(..., out, in)`` and the lower roots ``Lx``, ``Ly``, in float64.

        The roots multiply rounding by up to ``n / damping``, so they are never left to float32.
        """
        x_root = self._root(statistics.input_second_moment, "the input second moment")
        y_root = self._root(statistics.output_second_moment, "the output second moment")
        gradient = linalg.double_precision(linalg.check_finite(statistics.gradient, "the gradient"))
        half = torch.linalg.solve_triangular(y_root, gradient, upper=False)
        whitened = torch.linalg.solve_triangular(x_root.mT, half, upper=True, left=False)
        return whitened, x_root, y_root

    def _root(self, second: Tensor, what: str) -> Tensor:
        """Lower Cholesky factor of a damped second moment, in float64."""
        second = linalg.double_precision(second)
        damping = linalg.damping_value(
            second.diagonal(dim1=-2, dim2=-1), self.damping, self.damping_mode
        )
        return linalg.damped_cholesky(second, damping, what)
