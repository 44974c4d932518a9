"""Natural: the best rank-r natural-gradient step under the Kronecker-factored Fisher.

The Fisher factors are K-FAC's (Martens, Grosse, ICML 2015, arXiv 1503.05671), the rank-r cut is
Eckart-Young in their metric. That direction is CG-LoRA's (Zheng, Proutiere, arXiv 2603.29824; `CGLoRA`);
FCCA (Ye et al., arXiv 2609.00762) whitens by the factors' diagonals and trains an r x r core alone. Of
this package are the measured length and number of directions, the balanced rows, the refusal, and
repeated steps with a cut in the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import (
    ROW_NORM,
    TRUST_REGION,
    require_damping,
    require_number,
    require_types,
)
from lorainit.methods.metric import KroneckerMetric
from lorainit.types import DampingMode, Factors, LayerStatistics, LowRankStep, RowEnergies
from lorainit.types.numbers import require_count


@dataclass(frozen=True)
class Natural:
    r"""Preconditioned gradient steps, cut to rank r where the predictions feel the cut least.

    With ``X = Sx + lambda_x I`` and ``Y = Sy + lambda_y I``, among all steps of rank ``rank``
    ``Delta`` minimises the quadratic model ``<G, Delta> + |Y^(1/2) Delta X^(1/2)|_F^2 / 2``::

        M     = -Y^(-1/2) G X^(-1/2) = U S V^T,  its first `rank` triplets kept
        Delta =  Y^(-1/2) U S V^T X^(-1/2)

    Roots are Cholesky factors: another root turns ``M`` by orthogonal matrices on both sides and
    leaves ``Delta`` as it is. Then ``s B A = length * Delta``, with the rows of ``A`` along the right
    singular vectors of ``Delta``. Not anchored: the model starts displaced.

    The length is one number for the model. `get_peft_model` measures it by forward passes on
    sequences held back from the statistics, together with how many of the directions the step uses:
    directions with little signal cost more than they bring, and their rows of ``A`` are random ones
    with a zero column of ``B``. With ``steps > 1`` statistics are taken again at the displaced point,
    and the sum of the steps is cut back to the rank in the metric of the newest ones.

    The direction is that of CG-LoRA (arXiv 2603.29824), and near FCCA's (arXiv 2609.00762); what is
    measured, the size of the rows, the refusal and the further steps are this package's.

    Args:
        damping: added to the diagonals of both factors, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of each factor's own diagonal; ``"absolute"``: as
            it is, for both.
        activation: root mean square of each component of ``A x`` under the data, in units of a default
            LoRA's, ``sqrt(tr(Sx) / (3 in))``. An optimizer like Adam moves every entry of a factor by
            about the learning rate, whatever its size, so the first steps move the predictions by ``B``
            as much as ``A x`` is long, and by ``A`` as much as ``B`` is. Rows are longer than this where
            a step of ``A`` would move them more than one of ``B``, see `factors`. Measured in
            docs/natural.md.
        spare: where the length is measured, rows of ``A`` that no direction uses are a default LoRA's,
            so many times as long, drawn from torch's seed and the layer's name; None: they keep the
            next directions of the gradient.
        length: ``s B A`` in units of ``Delta``. None (default): measured by `get_peft_model`; `solve`
            alone then gives one ``Delta``, which only a search may use as it is: the unit follows the
            loss reduction (a loss ``c`` times larger makes ``Delta`` ``1 / c`` times as long), and
            the layers' steps, right one by one, add up.
        trust_region: where the length is measured, no layer's ``|s B A|_F`` exceeds so much of its
            ``|W|_F``. A loss that starts far above that of a guess can be lowered by wrecking the model,
            and what is wrecked does not train.
        steps: how often statistics are taken and a step is made; more than one needs data.
        rho: a layer may get up to ``rho`` times its configured rank when `get_peft_model`
            redistributes ranks by the decrease that its directions promise; 1 (default) keeps every
            rank as configured.
        least_gain: where the length is measured, and the start takes away less than this share of the
            loss on the held-back sequences (of a loss that may be negative: lowers it by less than
            this), it is plain LoRA in its place. 0 (default): any start that lowers the loss is taken;
            see `Auto`.
    """

    damping: float = 0.1
    damping_mode: DampingMode = "relative"
    activation: float = 0.5
    spare: float | None = 2.0
    length: float | None = None
    trust_region: float = TRUST_REGION
    steps: int = 1
    rho: float = 1.0
    least_gain: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset(
        {"gradient", "input_second_moment", "output_second_moment"}
    )
    layer_workspace: ClassVar[int] = 5
    """3.8 was measured on an H200 (a layer of 11,008 inputs)."""

    def __post_init__(self) -> None:
        require_types(self)
        require_damping(self.damping, self.damping_mode)
        require_number("activation", self.activation, inclusive=False)
        if self.spare is not None:
            require_number("spare", self.spare, inclusive=False)
        if self.length is not None:
            require_number("length", self.length, inclusive=False)
        require_number("trust_region", self.trust_region, inclusive=False)
        require_number("rho", self.rho, above=1.0)
        require_number("least_gain", self.least_gain)
        if self.least_gain >= 1:
            raise ValueError(
                f"least_gain must be below 1, all of the loss, got {self.least_gain!r}"
            )
        if self.least_gain > 0 and self.length is not None:
            raise ValueError(
                "a start of a given length is not measured: leave length at None, or least_gain at 0"
            )
        require_count("steps", self.steps, most=1000)
        if self.steps > 1 and self.length is not None:
            raise ValueError("several steps are measured one by one: leave length at None")

    @classmethod
    def paper(cls) -> Natural:
        """The defaults: no paper has these settings."""
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
            ``A`` ``(..., rank, in)`` with orthogonal rows, ``B`` ``(..., out, rank)`` with orthogonal
            columns, those of the product's largest singular values first; not anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        dtype = linalg.compute_dtype(weight, statistics)
        step = self.step(statistics, rank)
        left, right = step.left, step.right
        left = left if self.length is None else left * self.length
        a, b = self.factors(left, right, scaling, statistics)
        return Factors(a.to(weight.device, dtype), b.to(weight.device, dtype), anchored=False)

    @property
    def calibrated(self) -> bool:
        """Whether the length is to be measured."""
        return self.length is None

    def refusal(self, gain: float, *, share: bool = True) -> str | None:
        """Why a start that takes away this much of the loss is not taken: it is below `least_gain`."""
        if gain >= self.least_gain:
            return None
        return f"less than {self.least_gain:.0%}" if share else f"less than {self.least_gain:g}"

    def step(self, statistics: LayerStatistics, rank: int) -> LowRankStep:
        """One ``Delta``, strongest directions first, and the metric that it is cut in.

        Args:
            statistics: of one layer or a stack of layers.
            rank: of the step.
        """
        metric, whitened = self._whiten(statistics)
        u, s, v = linalg.top_singular(whitened, rank)
        left, right = -(u * s.unsqueeze(-2)).to(metric.y_root), v.mT.to(metric.x_root)
        return LowRankStep(*metric.out_of(left, right), metric)

    def factors(
        self,
        left: Tensor,
        right: Tensor,
        scaling: float,
        statistics: LayerStatistics,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""``A``, ``B`` with ``scaling * B A = left right`` and orthogonal rows of the right size.

        Adam's first step moves ``B`` by the signs ``sigma = sign(G A^T)`` times the learning rate, and
        ``A`` by ``tau = sign(B^T G)``. Row ``a`` and its column ``b`` then change the predictions, in
        the Kronecker-factored Fisher metric, by ``(sigma^T Sy sigma) (a Sx a^T)`` and by
        ``(b^T Sy b) (tau Sx tau^T)``. A row gets the size that makes the two equal, where their sum is
        least, or that of `activation` if it is longer (the column of an unused row is zero now and will
        not stay so), to eight binary digits.

        Args:
            left: ``(..., out, rank)``. A zero column keeps its row of ``right`` in the span of ``A``,
                unless `seeds` are given.
            right: ``(..., rank, in)``.
            scaling: above zero.
            statistics: with ``gradient`` and both second moments, not damped.
            seeds: of the random rows that `spare` asks for, one a layer, the same on every device.
        """
        directions = _Directions.of(left, right)
        energies = self._energies(directions, statistics)
        return self._sized(directions, energies, scaling, seeds)

    def row_energies(self, left: Tensor, right: Tensor, statistics: LayerStatistics) -> RowEnergies:
        """What `factors` reads of the statistics for this displacement, or for one that is a multiple of it.

        Args:
            left: ``(..., out, rank)``.
            right: ``(..., rank, in)``.
            statistics: as `factors` takes them.
        """
        return self._energies(_Directions.of(left, right), statistics)

    def factors_from(
        self,
        left: Tensor,
        right: Tensor,
        scaling: float,
        energies: RowEnergies,
        stretch: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`factors` without statistics.

        Args:
            left: ``(..., out, rank)``, `stretch` times that of which the energies are.
            right: ``(..., rank, in)``, the same.
            scaling: above zero.
            energies: see `row_energies`.
            stretch: ``(..., 1)``, not below zero.
            seeds: as `factors` takes them.
        """
        columns = energies.columns * stretch.to(energies.columns).square()
        stretched = replace(energies, columns=columns)
        return self._sized(_Directions.of(left, right), stretched, scaling, seeds)

    def _energies(self, directions: _Directions, statistics: LayerStatistics) -> RowEnergies:
        rows, content = directions.rows, directions.content
        inputs, gradient = statistics.input_second_moment, statistics.gradient.to(rows)
        diagonal = linalg.double_precision(inputs.diagonal(dim1=-2, dim2=-1).to(rows))
        # Damping bounds rows along which the data never go.
        damping = linalg.damping_value(diagonal, self.damping, self.damping_mode).unsqueeze(-1)
        outputs = statistics.output_second_moment
        return RowEnergies(
            (_energy(inputs, rows.mT) + damping).clamp_min(torch.finfo(diagonal.dtype).tiny),
            ROW_NORM**2 * diagonal.mean(-1, keepdim=True),
            _energy(outputs, linalg.product(gradient, rows.mT).sign()),
            _energy(outputs, content)
            * _energy(inputs, linalg.product(gradient.mT, content).sign()),
        )

    def _sized(
        self,
        directions: _Directions,
        energies: RowEnergies,
        scaling: float,
        seeds: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        rows, content, unused = directions.rows, directions.content, directions.unused
        seen, default = energies.inputs, energies.default
        tiny = torch.finfo(seen.dtype).tiny
        through_b = energies.outputs * seen * scaling**2
        balanced = (energies.columns / through_b.clamp_min(tiny)) ** 0.25
        sizes = torch.maximum(balanced, self.activation * (default / seen).sqrt())
        # Inputs that are all zero ask for no size.
        sizes = _rounded(torch.where(default > 0, sizes, ROW_NORM)).to(rows)
        a, b = rows * sizes.unsqueeze(-1), content / (sizes.unsqueeze(-2) * scaling)
        if self.spare is not None and seeds is not None:
            drawn = torch.stack([_uniform(seed, a.shape[-2:]) for seed in seeds]).reshape(a.shape)
            drawn = drawn.to(a) * (self.spare / a.shape[-1] ** 0.5)
            a = torch.where(unused.unsqueeze(-1), drawn, a)
        return a, b

    def metric(self, statistics: LayerStatistics) -> KroneckerMetric:
        """Roots of both damped second moments, in float64 where the device has it."""
        return KroneckerMetric.damped(statistics, self.damping, self.damping_mode)

    def rank_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """What each of a layer's directions is worth: the decrease that the model promises for it."""
        return self.singular_values(statistics, max_rank).square() / 2

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
        return linalg.top_singular(self._whiten(statistics)[1], max_rank)[1]

    def _whiten(self, statistics: LayerStatistics) -> tuple[KroneckerMetric, Tensor]:
        """The metric, and the gradient in its coordinates."""
        metric = self.metric(statistics)
        gradient = linalg.check_finite(statistics.gradient, "the gradient")
        whitened = metric.whiten_gradient(gradient)
        return metric, whitened.to(linalg.compute_dtype(gradient))


@dataclass(frozen=True, eq=False)
class _Directions:
    """A displacement as orthonormal rows and their columns, those of the largest singular values first.

    Attributes:
        rows: ``(..., rank, in)``.
        content: ``(..., out, rank)``; zero where `unused`.
        unused: ``(..., rank)``.
    """

    rows: Tensor
    content: Tensor
    unused: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> _Directions:
        rows, content = linalg.orthonormal_rows(left, right.mT)
        # What a cut leaves of unused columns is rounding.
        lengths = torch.linalg.vector_norm(content, dim=-2)
        rounding = max(content.shape[-2:]) * torch.finfo(content.dtype).eps
        unused = lengths <= rounding * lengths.amax(-1, keepdim=True)
        return cls(rows, content.masked_fill(unused.unsqueeze(-2), 0.0), unused)


def _energy(second_moment: Tensor, columns: Tensor) -> Tensor:
    """``v^T S v`` of every column ``v``, ``(..., rank)``, computed where ``S`` is; not below zero."""
    there = columns.to(second_moment)
    energy = (linalg.product(second_moment, there) * there).sum(-2).clamp_min(0)
    return linalg.double_precision(energy.to(columns.device))


def _uniform(seed: int, shape: torch.Size) -> Tensor:
    """Numbers between -1 and 1."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def _rounded(sizes: Tensor) -> Tensor:
    """Sizes to eight binary digits: the same in whatever stack a layer's sums were rounded."""
    mantissa, exponent = torch.frexp(sizes)
    return torch.ldexp((256 * mantissa).round() / 256, exponent)
