"""KroneckerQER: what quantization took from the weight, as the model's predictions see it.

Quantization error reconstruction, as QERA (arXiv 2410.06040), with the output side weighed as well, by
the Kronecker-factored Fisher of K-FAC (Martens, Grosse, ICML 2015, arXiv 1503.05671). The repository
guzhi9904-ux/KFAC-QERA pairs the two; no paper on it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_damping, require_number
from lorainit.methods._weight_error import factors_of_terms, weight_error
from lorainit.methods.metric import KroneckerMetric
from lorainit.types import DampingMode, Factors, LayerStatistics


@dataclass(frozen=True)
class KroneckerQER:
    r"""The rank-r matrix closest to ``E = W - Q`` in the Kronecker-factored Fisher metric.

    With ``X = Sx + lambda_x I``, ``Y = Sy + lambda_y I`` and ``Y^(1/2) E X^(1/2) = U S V^T`` cut to
    ``rank`` triplets::

        s B A = Y^(-1/2) U S V^T X^(-1/2) = Y^(-1/2) U U^T Y^(1/2) E

    Among all matrices ``D`` of the rank it minimises ``|Y^(1/2) (E - D) X^(1/2)|_F``: to second order,
    and as far as the Fisher is a Kronecker product, the change of the predictions that is left.
    ``Y = I`` gives `QERA`, and ``X = I`` as well gives `LoftQ`. Not anchored: the model starts nearer to
    the full-precision one. Needs ``reference_weights`` of `get_peft_model`.

    Args:
        balanced: split every rank-one term into a row and a column of equal norm. False: ``B`` is
            ``Y^(-1/2) U``, with ``Y`` in units of its own mean.
        damping: added to the diagonals of both factors, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of each factor's own diagonal; ``"absolute"``: as
            it is, for both.
        rho: a layer may get up to ``rho`` times its configured rank when `get_peft_model`
            redistributes ranks, within the parameters of the configured ones, by what a direction takes
            from the objective, summed over layers, over its parameters; 1 (default) keeps every rank as
            configured.
    """

    balanced: bool = True
    damping: float = 0.01
    damping_mode: DampingMode = "relative"
    rho: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "output_second_moment"})
    needs_reference: ClassVar[bool] = True
    keeps_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_damping(self.damping, self.damping_mode)
        require_number("rho", self.rho, above=1.0)

    @classmethod
    def paper(cls) -> KroneckerQER:
        """The defaults: there is no paper."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``, the base weight; only its shape is read.
            statistics: with both second moments in full and ``weight_error``.
            rank: number of triplets.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; not anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        error = weight_error(statistics, "KroneckerQER")
        return factors_of_terms(
            *self.term(error, statistics, rank), scaling, balanced=self.balanced
        )

    def term(self, error: Tensor, statistics: LayerStatistics, rank: int) -> tuple[Tensor, Tensor]:
        """``s B A`` as ``left right``, ``(..., out, rank)`` and ``(..., rank, in)``, strongest first.

        Args:
            error: ``(..., out, in)``, ``E``.
            statistics: with both second moments in full.
            rank: number of triplets.
        """
        seen = self._seen(error, statistics)
        u, _, _ = linalg.top_singular(seen.by_both, rank)
        left = seen.metric.y_triangle.solve_transposed(u.to(seen.unit)) * seen.unit
        return left.to(error), u.mT @ seen.by_outputs

    def rank_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """What each of a layer's directions is worth: what it takes from the objective.

        Args:
            statistics: of one layer or a stack of layers, as `solve` takes them.
            max_rank: how many, at most ``min(out, in)``.

        Returns:
            ``(..., max_rank)``, descending: the squares of ``S``, in the loss's own units, summed over
            counted positions, on which the Fisher is a sum.
        """
        error = weight_error(statistics, "KroneckerQER")
        linalg.check_rank(max_rank, *error.shape[-2:])
        seen = self._seen(error, statistics)
        values = linalg.top_singular(seen.by_both, max_rank)[1].to(seen.unit)
        # The metric is of means, and layers may see different numbers of positions.
        positions = torch.as_tensor(statistics.positions).to(seen.unit).clamp_min(1)
        return (values * seen.unit.squeeze(-1)).square() * positions.unsqueeze(-1)

    def _seen(self, error: Tensor, statistics: LayerStatistics) -> _Seen:
        """What quantization took, ``(..., out, in)``, in the metric."""
        metric = KroneckerMetric.damped(statistics, self.damping, self.damping_mode)
        # The unit of Y falls out of the product, and would leave float32's range where losses are small.
        unit = metric.y_root.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        by_outputs = linalg.whole_product((metric.y_root / unit).to(error).mT, error)
        x_root = linalg.once(lambda root: root.to(error), metric.x_root)
        return _Seen(metric, unit, by_outputs, linalg.whole_product(by_outputs, x_root))


@dataclass(frozen=True, eq=False)
class _Seen:
    """``E`` in the metric of a layer, or of a stack of layers.

    Attributes:
        metric: of both sides.
        unit: ``(..., 1, 1)``, which both of the following are divided by.
        by_outputs: ``(..., out, in)``, ``Y^(1/2) E`` up to an orthogonal matrix.
        by_both: ``(..., out, in)``, ``Y^(1/2) E X^(1/2)`` up to orthogonal matrices.
    """

    metric: KroneckerMetric
    unit: Tensor
    by_outputs: Tensor
    by_both: Tensor
