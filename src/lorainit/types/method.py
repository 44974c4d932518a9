"""What the pipeline asks of a method: one protocol for all, and one for each thing that some want besides.

Nothing in the package asks which method it is. A method that wants its length measured, several steps,
redistributed ranks, a refusal, PEFT's own start or another method's says so by the members of the protocol
for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from lorainit.types.factors import Factors, LayerSpec
from lorainit.types.layer_statistics import LayerStatistics


@runtime_checkable
class Method(Protocol):
    """What the pipeline asks of a method; any object with these members is one."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that `solve` reads, a subset of `STATISTICS`."""

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """The starting factors of one layer, or of several with leading dimensions.

        Args:
            weight: ``(..., out, in)``, the frozen base weight, floating.
            statistics: of the same leading shape, holding at least `needs`.
            rank: at most ``min(out, in)``.
            scaling: the layer's ``s`` in ``W + s B A``.

        Returns:
            Factors in float32, or float64 where weight or statistics are.
        """


@runtime_checkable
class DoubtsStatistics(Method, Protocol):
    """A method that says what is doubtful in statistics, where a start is made from them."""

    def doubt(self, statistics: LayerStatistics) -> str | None:
        """What to look at, in one line for the log; None: nothing."""


@runtime_checkable
class UsesDefaultStart(Method, Protocol):
    """A method that may ask for PEFT's own random start, of a new adapter, instead of factors."""

    @property
    def uses_default_start(self) -> bool:
        """Whether the adapter stays as PEFT draws it."""


@runtime_checkable
class ReadsWeight(Method, Protocol):
    """A method that says whether it reads weights: if not, layers start whose weight cannot be read."""

    @property
    def reads_weight(self) -> bool:
        """Whether `solve` reads more of the weight than its shape, dtype and device."""


@runtime_checkable
class ReadsReference(Method, Protocol):
    """A method that reads what quantization took: ``statistics.weight_error``, ``W - Q``.

    `get_peft_model` sets it from ``reference_weights``.
    """

    @property
    def needs_reference(self) -> bool:
        """Whether there is no start without it; if not, it is there where the user gives it."""


@runtime_checkable
class LimitsRank(Method, Protocol):
    """A method that takes more directions of a layer than the adapter's rank."""

    @property
    def rank_factor(self) -> int:
        """How many: the rank may be at most ``min(out, in) / rank_factor``."""


@runtime_checkable
class RanksDirections(Method, Protocol):
    """A method that says what a layer's directions are worth, so that ranks can be redistributed."""

    @property
    def rho(self) -> float:
        """A layer may get up to so many times its configured rank; 1: none is redistributed."""

    def rank_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """``(..., max_rank)`` descending, comparable across layers."""


@runtime_checkable
class KeepsParameters(RanksDirections, Protocol):
    """A method that says whether redistributed ranks may cost more parameters than the configured ones."""

    @property
    def keeps_parameters(self) -> bool:
        """If so, they have at most as many parameters; if not, the same sum, whatever a rank costs a layer."""


@runtime_checkable
class RanksLayers(Method, Protocol):
    """A method whose ranks follow from one number of each layer, which may read the weight."""

    @property
    def redistributes(self) -> bool:
        """Whether ranks other than the configured ones are asked for."""

    def importance(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """``(...)``, comparable across layers; `statistics` hold `needs`."""

    def ranks(
        self, importance: Mapping[str, float], layers: Mapping[str, LayerSpec]
    ) -> dict[str, int]:
        """Rank by layer name, from all layers' importance and their configured ranks."""


@runtime_checkable
class EstimatesWorkspace(Method, Protocol):
    """A method that knows how much memory its solves take, so that more layers fit in a stack."""

    @property
    def workspace(self) -> int:
        """Bytes that a solve in float32 takes, as a multiple of its statistics' bytes."""


@runtime_checkable
class EstimatesSolve(Method, Protocol):
    """A method that knows how much memory the solve of one layer takes, whatever dtypes it is in.

    Where layers are solved block by block, so much is kept free for it.
    """

    @property
    def layer_workspace(self) -> int:
        """Bytes beside its statistics, as a multiple of these; not under ``precision="exact"``."""


@runtime_checkable
class MeasuresLength(Method, Protocol):
    """A method whose start gives a direction, and whose length is found on held-back sequences."""

    @property
    def calibrated(self) -> bool:
        """Whether the length is to be measured. If not, the factors are the start as they are."""

    @property
    def trust_region(self) -> float:
        """No layer moves by more than this share of its weight's Frobenius norm."""


@runtime_checkable
class RefusesStart(MeasuresLength, Protocol):
    """A method that may prefer plain LoRA to the start that was measured."""

    def refusal(self, gain: float, *, share: bool = True) -> str | None:
        """Why plain LoRA is taken in its place, as the end of a sentence; None: the start is taken.

        Args:
            gain: the share of the loss on held-back sequences that is gone.
            share: if false, the loss may be negative, and `gain` is by how much it is lower.
        """


@runtime_checkable
class LeavesItToHeads(Method, Protocol):
    """A method that takes no step where heads beside the adapter were fitted first."""

    @property
    def beside_fitted_heads(self) -> str:
        """Why plain LoRA is taken in its place, as the end of a sentence."""


@runtime_checkable
class ChangesStart(Method, Protocol):
    """A method whose start is another's, changed layer by layer once it is found and measured."""

    @property
    def like(self) -> Method:
        """The other method, which is started whole: lengths, ranks and refusal are its own."""

    def changed(self, start: Factors, weight: Tensor) -> Factors:
        """A layer's factors from the other's, given the weight ``(..., out, in)``."""


class Metric(Protocol):
    """A quadratic form on a layer's displacements, by coordinates in which it is the Frobenius norm."""

    def into(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """A displacement ``left @ right``, ``(..., out, k)`` and ``(..., k, in)``, in these coordinates."""


@dataclass(frozen=True, eq=False)
class LowRankStep:
    """One step of a layer's weight, or of a stack of layers.

    Attributes:
        left: ``(..., out, rank)``.
        right: ``(..., rank, in)``; the step is ``left @ right``, strongest directions first.
        metric: in which a sum of steps is cut to the rank; None: the Frobenius norm.
    """

    left: Tensor
    right: Tensor
    metric: Metric | None = None


@runtime_checkable
class TakesSteps(MeasuresLength, Protocol):
    """A method whose start is one or more low-rank steps, each from statistics taken where the last one led.

    For each step a length and a number of directions are measured.
    """

    @property
    def steps(self) -> int:
        """How many, at least 1."""

    def step(self, statistics: LayerStatistics, rank: int) -> LowRankStep:
        """The step from statistics of one layer or a stack of layers."""

    def factors(
        self,
        left: Tensor,
        right: Tensor,
        scaling: float,
        statistics: LayerStatistics,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``A`` ``(..., rank, in)`` and ``B`` ``(..., out, rank)`` with ``scaling * B A = left @ right``.

        Of one layer or a stack of layers.

        Args:
            left: ``(..., out, rank)``; a zero column is a direction that no step uses.
            right: ``(..., rank, in)``.
            scaling: above zero.
            statistics: what the last step was taken from.
            seeds: of random rows for unused directions, one a layer, the same on every device.
        """


@dataclass(frozen=True, eq=False)
class RowEnergies:
    """What the sizes of a start's rows follow from, for a displacement ``left @ right`` of one or more layers.

    Its rows are orthonormal, its columns as long as its singular values.

    Attributes:
        inputs: ``(..., rank)``, of each row under the inputs' second moment, damped.
        default: ``(..., 1)``, of a default LoRA's row.
        outputs: ``(..., rank)``, of the signs of the gradient along each row, under the outputs'.
        columns: ``(..., rank)``, of each column under the outputs', times that of the signs of the gradient
            along it under the inputs'.
    """

    inputs: Tensor
    default: Tensor
    outputs: Tensor
    columns: Tensor

    def by_displacement(self) -> list[RowEnergies]:
        """Those of each of several displacements of the same layers, which the first dimension counts."""
        parts = zip(self.inputs, self.outputs, self.columns, strict=True)
        return [RowEnergies(one, self.default, other, third) for one, other, third in parts]


@runtime_checkable
class ForgetsStatistics(TakesSteps, Protocol):
    """A method whose factors follow from a step and a few numbers of each row.

    So a layer's statistics may be forgotten before the step's length is measured.
    """

    def row_energies(self, left: Tensor, right: Tensor, statistics: LayerStatistics) -> RowEnergies:
        """Of the displacement ``left @ right``, from the statistics that the step was taken from.

        Of several displacements at once, where the factors have one dimension more, in front.
        """

    def factors_from(
        self,
        left: Tensor,
        right: Tensor,
        scaling: float,
        energies: RowEnergies,
        stretch: Tensor,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `factors` gives of ``left @ right``, `stretch` times the one of which the energies are.

        The energies and `stretch`, ``(..., 1)``, are of the layers that the factors are of.
        """


@runtime_checkable
class GivesBack(MeasuresLength, ReadsReference, Protocol):
    """A method that gives back what quantization took, where that is known and much, in place of its own start.

    Attributes:
        least_taken: of ``|W - Q| / |W|``, the median over layers: below it nothing is given back.
    """

    least_taken: float

    @property
    def giving_back(self) -> Method:
        """The closed form that does it, from statistics that this method has; not anchored."""


def settings_of(method: Method) -> dict[str, object]:
    """A method's class name under ``"method"`` and, where it is a dataclass, its settings; JSON-ready.

    A setting that is a method itself is a dictionary of the same form.
    """
    name: dict[str, object] = {"method": type(method).__name__}
    if not is_dataclass(method):
        return name
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    nested = {n: settings_of(v) for n, v in values.items() if isinstance(v, Method)}
    return name | values | nested
