"""Statistics of one layer, as raw sums and counts.

They are divided in one place, here. So batches, processes and resumed runs merge by addition, whatever
the padding or the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lorainit.errors import MissingStatisticError
from lorainit.types.diagonal import Diagonal
from lorainit.types.names import LossReduction


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums and counts of one layer, or of several layers of one shape, stacked in front.

    With ``x_t`` the layer's input at a counted position, ``g_t`` the gradient of that sequence's own
    loss with respect to the layer's output, and ``l_i`` the loss of sequence ``i``:

    Attributes:
        gradient_sum: ``(..., out, in)``, sum over sequences of ``d l_i / d W``.
        input_second_moment_sum: ``(..., in, in)``, sum over counted positions of ``x x^T``.
        input_sum: ``(..., in)``, sum over counted positions of ``x``.
        input_counts: ``(..., in)``, of one-hot inputs, how often each was counted: all there is of both sums.
        output_second_moment_sum: ``(..., out, out)``, sum over counted positions of ``g g^T``.
        output_second_moment_diagonal_sum: ``(..., out)``, the diagonal of the same.
        sequences: sequences that had at least one label.
        label_tokens: label tokens over all sequences (labels, where there is one per sample).
        positions: counted positions.
        loss_reduction: ``"sequence"``: ``l_i`` is a mean over the sequence's own label tokens and the
            gradient is a mean over sequences; ``"token"``: ``l_i`` is a sum over its label tokens and
            the gradient is divided by all label tokens.
        population: number of samples that will be fine-tuned on (LoRA-DA's ``N``), where known.
        weight_error: ``(..., out, in)``, the full-precision weight less the base's, ``E = W - Q``, for
            methods that read it (`ReadsReference`). It is no sum: it is set where a layer is solved, and
            never collected or saved.

    All tensors of one object share device and floating dtype, but for a gradient that was added up in
    bfloat16; means are float32 at least. Counts are numbers, or ``(...)`` tensors in a stack.
    """

    gradient_sum: Tensor | None = None
    input_second_moment_sum: Tensor | None = None
    input_sum: Tensor | None = None
    input_counts: Tensor | None = None
    output_second_moment_sum: Tensor | None = None
    output_second_moment_diagonal_sum: Tensor | None = None
    sequences: float | Tensor = 0.0
    label_tokens: float | Tensor = 0.0
    positions: float | Tensor = 0.0
    loss_reduction: LossReduction = "sequence"
    population: float | Tensor | None = None
    weight_error: Tensor | None = None

    TENSORS: ClassVar[tuple[str, ...]] = (
        "gradient_sum",
        "input_second_moment_sum",
        "input_sum",
        "input_counts",
        "output_second_moment_sum",
        "output_second_moment_diagonal_sum",
    )
    OF_INPUT: ClassVar[tuple[str, ...]] = ("input_second_moment_sum", "input_sum", "input_counts")
    COUNTS: ClassVar[tuple[str, ...]] = ("sequences", "label_tokens", "positions")
    _HELD: ClassVar[tuple[str, ...]] = (*TENSORS, "weight_error")

    @property
    def gradient(self) -> Tensor:
        """``(..., out, in)``: mean gradient ``G`` of the weight, in the units of ``loss_reduction``."""
        count = self.sequences if self.loss_reduction == "sequence" else self.label_tokens
        return _mean(self._require("gradient_sum", "gradient"), count, 2)

    @property
    def input_second_moment(self) -> Tensor:
        """``(..., in, in)``: ``Sx``, mean over counted positions of ``x x^T``, uncentred.

        Of one-hot inputs it is a `Diagonal`, which methods work with as with a tensor.
        """
        if self.input_second_moment_sum is None and self.input_counts is not None:
            return Diagonal(_mean(self.input_counts, self.positions, 1))  # type: ignore[return-value]
        total = self._require("input_second_moment_sum", "input_second_moment")
        return _mean(total, self.positions, 2)

    @property
    def input_mean(self) -> Tensor:
        """``(..., in)``: mean over counted positions of ``x``."""
        if self.input_sum is None and self.input_counts is not None:
            return _mean(self.input_counts, self.positions, 1)
        return _mean(self._require("input_sum", "input_mean"), self.positions, 1)

    @property
    def output_second_moment(self) -> Tensor:
        """``(..., out, out)``: ``Sy``, mean over counted positions of ``g g^T``."""
        total = self._require("output_second_moment_sum", "output_second_moment")
        return _mean(total, self.positions, 2)

    @property
    def output_second_moment_diagonal(self) -> Tensor:
        """``(..., out)``: diagonal of ``Sy``; taken from the full matrix where only that is there."""
        total = self.output_second_moment_diagonal_sum
        if total is None and self.output_second_moment_sum is not None:
            total = self.output_second_moment_sum.diagonal(dim1=-2, dim2=-1)
        if total is None:
            raise _missing("output_second_moment_diagonal", self.available)
        return _mean(total, self.positions, 1)

    @property
    def available(self) -> frozenset[str]:
        """Names of the statistics that this object can give."""
        have = {
            name
            for name, field in (
                ("gradient", self.gradient_sum),
                ("input_second_moment", self.input_second_moment_sum),
                ("input_mean", self.input_sum),
                ("output_second_moment", self.output_second_moment_sum),
                ("output_second_moment_diagonal", self.output_second_moment_diagonal_sum),
            )
            if field is not None
        }
        if self.input_counts is not None:
            have |= {"input_second_moment", "input_mean"}
        if "output_second_moment" in have:
            have.add("output_second_moment_diagonal")
        return frozenset(have)

    @property
    def dtype(self) -> torch.dtype:
        """Of the means: float32, or wider where sums are."""
        held = (tensor.dtype for name in self._HELD if (tensor := getattr(self, name)) is not None)
        return reduce(torch.promote_types, held, torch.float32)

    @property
    def device(self) -> torch.device | None:
        """Where its tensors lie; None without any."""
        held = (t.device for name in self._HELD if (t := getattr(self, name)) is not None)
        return next(held, None)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerStatistics:
        """The same statistics on another device or in another floating dtype."""
        moved = {
            name: tensor.to(device=device, dtype=dtype)
            for name in self._HELD
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def only(self, needs: frozenset[str]) -> LayerStatistics:
        """The same statistics without the tensors that `needs` does not name."""
        full = self.output_second_moment_sum
        diagonal = self.output_second_moment_diagonal_sum
        if diagonal is None and full is not None:
            diagonal = full.diagonal(dim1=-2, dim2=-1)
        keep_full = "output_second_moment" in needs
        keep_diagonal = "output_second_moment_diagonal" in needs and not keep_full
        return replace(
            self,
            gradient_sum=self.gradient_sum if "gradient" in needs else None,
            input_second_moment_sum=(
                self.input_second_moment_sum if "input_second_moment" in needs else None
            ),
            input_sum=self.input_sum if "input_mean" in needs else None,
            input_counts=(
                self.input_counts if needs & {"input_second_moment", "input_mean"} else None
            ),
            output_second_moment_sum=full if keep_full else None,
            output_second_moment_diagonal_sum=diagonal if keep_diagonal else None,
        )

    @classmethod
    def stack(cls, layers: Sequence[LayerStatistics], *, sharing: int = 1) -> LayerStatistics:
        """Layers of one shape as one object with a leading layer dimension.

        Only tensors that every layer has are kept. Counts become float64 tensors on the CPU.

        Args:
            layers: in order.
            sharing: every so many consecutive layers read one input. Above 1 there are two leading
                dimensions, ``(groups, sharing)``, and what belongs to the input, taken from each
                group's first layer, is there once and expanded (stride zero).
        """
        first = layers[0]
        values: dict[str, Tensor | None] = {}
        for name in cls._HELD:
            once = sharing > 1 and name in cls.OF_INPUT
            tensors = [getattr(layer, name) for layer in layers[:: sharing if once else 1]]
            stacked = None
            if all(t is not None for t in tensors):
                # A single one is not copied.
                stacked = torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)
            if stacked is not None and once:
                stacked = stacked.unsqueeze(1).expand(-1, sharing, *stacked.shape[1:])
            elif stacked is not None and sharing > 1:
                stacked = stacked.reshape(-1, sharing, *stacked.shape[1:])
            values[name] = stacked
        for name in cls.COUNTS:
            counts = [float(getattr(layer, name)) for layer in layers]
            count = torch.tensor(counts, dtype=torch.float64)
            values[name] = count if sharing == 1 else count.reshape(-1, sharing)
        populations = [layer.population for layer in layers]
        population = (
            None
            if any(p is None for p in populations)
            else torch.tensor([float(p) for p in populations if p is not None], dtype=torch.float64)
        )
        if population is not None and sharing > 1:
            population = population.reshape(-1, sharing)
        return cls(**values, loss_reduction=first.loss_reduction, population=population)  # type: ignore[arg-type]

    @classmethod
    def from_means(
        cls,
        *,
        gradient: Tensor | None = None,
        input_second_moment: Tensor | None = None,
        input_mean: Tensor | None = None,
        output_second_moment: Tensor | None = None,
        output_second_moment_diagonal: Tensor | None = None,
        population: float | None = None,
    ) -> LayerStatistics:
        """Statistics from means computed elsewhere; every count is one."""
        return cls(
            gradient_sum=gradient,
            input_second_moment_sum=input_second_moment,
            input_sum=input_mean,
            output_second_moment_sum=output_second_moment,
            output_second_moment_diagonal_sum=output_second_moment_diagonal,
            sequences=1.0,
            label_tokens=1.0,
            positions=1.0,
            population=population,
        )

    def _require(self, field: str, name: str) -> Tensor:
        tensor: Tensor | None = getattr(self, field)
        if tensor is None:
            raise _missing(name, self.available)
        return tensor


def _missing(name: str, available: frozenset[str]) -> MissingStatisticError:
    have = ", ".join(sorted(available)) or "nothing"
    return MissingStatisticError(
        f"the statistic '{name}' was not collected (there is: {have}). "
        f"Collect again with needs containing '{name}', for example needs=method.needs."
    )


def _mean(total: Tensor, count: float | Tensor, trailing: int) -> Tensor:
    """Divide a sum by its count, the count broadcast over the statistic's own dimensions.

    A new tensor; of a sum in half precision, in float32.
    """
    if total.dtype in (torch.float16, torch.bfloat16):
        return _mean(total.float(), count, trailing)
    if isinstance(count, Tensor):
        shaped = count.to(device=total.device, dtype=total.dtype)
        if total.dim() == trailing + 2 and total.stride(1) == 0:
            # Layers that share an input share its count: divide once.
            return _mean(total[:, 0], count[:, 0], trailing).unsqueeze(1).expand_as(total)
        return total / shaped.reshape(*count.shape, *([1] * trailing)).clamp_min(1)
    return total / max(count, 1.0)
