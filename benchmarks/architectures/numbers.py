"""Collected statistics beside the truth, and beside themselves under another batching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.architectures.reference import Reference
from lorainit.types import LayerStatistics

TOLERANCE = 1e-3
"""Relative to the sum's norm."""
_SMALL = 1e-4
"""Of the largest layer's norm: what is smaller is compared with this share of it, since it is rounding."""
_FIELDS = ("gradient_sum", "input_second_moment_sum", "output_second_moment_sum")


def distance(found: Tensor, right: Tensor, least: float = 0.0) -> float:
    """The relative norm of a difference."""
    right = right.double().cpu()
    return float((found.double().cpu() - right).norm()) / max(float(right.norm()), least, 1e-30)


def against_truth(statistics: Mapping[str, LayerStatistics], truth: Reference) -> dict[str, Any]:
    """The worst layer of each statistic, with its relative error; and layers that are missing."""
    largest = max((float(g.norm()) for g in truth.gradients.values() if g is not None), default=0.0)
    worst = _Worst()
    for name, gradient in truth.gradients.items():
        if name not in statistics:
            if gradient is not None and float(gradient.norm()) > _SMALL * largest:
                worst.note("missing", name, 1.0)
            continue
        layer = statistics[name]
        if layer.gradient_sum is not None and gradient is not None:
            error = distance(layer.gradient_sum, gradient, _SMALL * largest)
            worst.note("gradient", name, error)
        if name in truth.inputs and layer.input_second_moment_sum is not None:
            right = (truth.inputs[name], truth.unpadded[name])
            error = min(distance(layer.input_second_moment_sum, some) for some in right)
            worst.note("inputs", name, error)
        if name in truth.outputs and layer.output_second_moment_sum is not None:
            right = truth.outputs[name]
            error = distance(
                layer.output_second_moment_sum, right, (_SMALL * largest) ** 2 * _SMALL
            )
            worst.note("outputs", name, error)
    return worst.found


def against_each_other(
    batched: Mapping[str, LayerStatistics], alone: Mapping[str, LayerStatistics]
) -> dict[str, Any]:
    """The same for statistics of padded batches, beside those of single rows."""
    worst = _Worst()
    sizes = {
        field: max(float(t.norm()) for n in alone if (t := getattr(alone[n], field)) is not None)
        for field in _FIELDS
        if any(getattr(alone[n], field) is not None for n in alone)
    }
    for name in alone:
        if name not in batched:
            worst.note("missing", name, 1.0)
            continue
        for field, size in sizes.items():
            one, other = getattr(batched[name], field), getattr(alone[name], field)
            if one is not None and other is not None:
                share = _SMALL**2 if field.startswith("output") else _SMALL
                worst.note(field.removesuffix("_sum"), name, distance(one, other, share * size))
        if batched[name].positions != alone[name].positions:
            counts = f"{batched[name].positions:g} for {alone[name].positions:g}"
            worst.found.setdefault("positions", [name, counts])
    return worst.found


def wrong(found: Mapping[str, Any]) -> list[str]:
    """Which of them are beyond the tolerance."""
    return [
        key
        for key, (_, value) in found.items()
        if isinstance(value, str) or not value <= TOLERANCE  # NaN is wrong too.
    ]


class _Worst:
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def note(self, key: str, name: str, error: float) -> None:
        if key not in self.found or not error <= self.found[key][1]:
            self.found[key] = [name, error]
