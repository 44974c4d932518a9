"""What a displacement promises for the loss: its slope, and its bend under the Fisher factors.

Half of the curvature that training feels is known from the statistics: the mean gradient gives the
slope along a displacement, and the second moments of inputs and output gradients give, as in K-FAC
(Martens, Grosse, arXiv 1503.05671), the bend. Layers are taken one by one and added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lorainit.adapters.layers import adapter_layers, matrices
from lorainit.types import LayerStatistics


@dataclass(frozen=True, eq=False)
class Displacement:
    """``s B A`` of one layer, the frozen start of an anchored adapter subtracted.

    Attributes:
        left: ``(out, k)``, scaled.
        right: ``(k, in)``.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class PredictedDecrease:
    """What the quadratic model says of a displacement, in units of the loss.

    Attributes:
        slope: ``<G, Delta>``: the change of the loss to first order.
        bend: ``<Delta, H Delta>`` with ``H`` the Fisher's Kronecker factors.
    """

    slope: float
    bend: float

    @property
    def change(self) -> float:
        """Of the loss, to second order."""
        return self.slope + self.bend / 2


def displacements_of(model: PeftModel, adapter_name: str) -> dict[str, Displacement]:
    """What the adapter adds to every layer with a plain pair, by the base model's module name."""
    found = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        pair = matrices(layer, adapter_name, trained=False)
        if pair is not None:
            a, b = pair
            found[name] = Displacement(b * layer.scaling[adapter_name], a)
    return found


def curvature_unit(statistics: LayerStatistics) -> float:
    r"""What ``Sy (x) Sx`` is times, to be the curvature of the loss whose gradient ``G`` is.

    With ``T`` counted positions and ``L`` label tokens in a sequence, the Fisher information of a
    sequence's summed loss is ``T E[g g^T] (x) E[x x^T]`` with that sum's ``g``. A sequence's mean loss
    has gradients ``1 / L`` of those, and ``1 / L`` of that curvature: ``T L Sy (x) Sx``. The mean over
    label tokens of summed losses: ``T / L``.
    """
    sequences = max(float(statistics.sequences), 1.0)
    positions = float(statistics.positions) / sequences
    labels = max(float(statistics.label_tokens) / sequences, 1.0)
    return positions * labels if statistics.loss_reduction == "sequence" else positions / labels


def predicted_decrease(
    displacement: Displacement, statistics: LayerStatistics
) -> PredictedDecrease | None:
    """Slope and bend of one layer; None where the statistics lack one of the three."""
    if not {"gradient", "input_second_moment", "output_second_moment"} <= statistics.available:
        return None
    gradient = statistics.gradient.double().cpu()
    left, right = displacement.left.double().cpu(), displacement.right.double().cpu()
    slope = ((left.mT @ gradient) * right).sum()
    output = left.mT @ statistics.output_second_moment.double().cpu() @ left
    inputs = right @ statistics.input_second_moment.double().cpu() @ right.mT
    bend = curvature_unit(statistics) * (output * inputs).sum()
    return PredictedDecrease(float(slope), float(bend))


@dataclass(frozen=True)
class StartLoss:
    """The loss before and after a start, measured.

    Attributes:
        base: of the base model.
        start: with the adapter.
        on: on what, in words.
    """

    base: float
    start: float
    on: str


def measured_loss(measured: Mapping[str, Any]) -> StartLoss | None:
    """What was measured when the adapter was started, as its side file holds it."""
    try:
        base, start = float(measured["base_loss"]), float(measured["start_loss"])
    except (KeyError, TypeError, ValueError):
        return None
    return StartLoss(base, start, "the sequences held back when it was started")


def total(promises: Mapping[str, PredictedDecrease]) -> PredictedDecrease:
    """Of all layers, one by one."""
    values = torch.tensor([[p.slope, p.bend] for p in promises.values()], dtype=torch.float64)
    slope, bend = values.sum(0).tolist() if len(values) else (0.0, 0.0)
    return PredictedDecrease(slope, bend)
