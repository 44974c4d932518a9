r"""What quantization took from every layer's outputs, and what an adapter gives back of it.

With ``E = W - Q`` a layer's outputs change by ``E x``, whose mean square over the data is
``|E Sx^(1/2)|_F^2 = tr(E Sx E^T)``; with the adapter, by ``(E - s B A) x``.
"""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from lorainit import linalg
from lorainit.adapters.layers import adapter_layers, matrices
from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Target
from lorainit.adapters.tensor_sources import TensorSource
from lorainit.adapters.weights import read_weight
from lorainit.errors import MissingStatisticError
from lorainit.statistics import Statistics
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
class QuantizationLoss:
    """What quantization took from one layer.

    Attributes:
        of_weight: ``|E| / |W|``.
        of_outputs: ``|E Sx^(1/2)| / |W Sx^(1/2)|``.
        given_back: ``1 - |(E - s B A) Sx^(1/2)| / |E Sx^(1/2)|``; negative where the adapter moves the outputs
            further away, None without an adapter on this layer, or where nothing was taken.
    """

    of_weight: float
    of_outputs: float
    given_back: float | None = None


def displacements_of(model: PeftModel, adapter_name: str) -> dict[str, Displacement]:
    """What the adapter adds to every layer with a plain pair, by the base model's module name."""
    found = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        pair = matrices(layer, adapter_name, trained=False)
        if pair is not None:
            a, b = pair
            found[name] = Displacement(b * layer.scaling[adapter_name], a)
    return found


def reference_of(
    source: TensorSource, targets: Sequence[Target], statistics: Statistics
) -> ReferenceWeights:
    """The full-precision weights of these layers, checked before any work.

    Raises:
        AdapterError: they are not what was quantized.
        MissingStatisticError: a layer's statistics hold no input second moment.
    """
    for target in targets:
        if "input_second_moment" not in statistics[target.name].available:
            raise MissingStatisticError(
                f"what quantization took is measured in the input second moment, which the statistics of layer "
                f"'{target.name}' lack: collect them for QERA or Natural."
            )
    return ReferenceWeights.of(source, {target.name: target for target in targets})


def quantization_loss(
    target: Target,
    statistics: LayerStatistics,
    reference: ReferenceWeights,
    displacement: Displacement | None = None,
) -> QuantizationLoss:
    """Of one layer, in float64; the reference weight is read for it and forgotten.

    Args:
        target: the layer of the quantized model.
        statistics: with ``input_second_moment``.
        reference: the weights that were quantized.
        displacement: what an adapter adds.
    """
    with torch.no_grad():
        weight = read_weight(target.module, target.name)
        full = _double(reference.read(target))
        error = full - _double(weight)
        moment = _double(statistics.input_second_moment)
        size, whole = float(error.norm()), float(full.norm())
        took, outputs, back = _norm(error, moment), _norm(full, moment), None
        if displacement is not None and took > 0:
            left = error - _double(displacement.left) @ _double(displacement.right)
            back = 1 - _norm(left, moment) / took
    return QuantizationLoss(
        size / whole if whole else 0.0, took / outputs if outputs else 0.0, back
    )


def in_words(losses: Mapping[str, QuantizationLoss], *, adapter: bool) -> str:
    """One sentence: what was taken, where most, and what came back.

    Args:
        losses: by layer name, at least one.
        adapter: whether there is one.
    """
    took = {name: loss.of_outputs for name, loss in losses.items()}
    worst = max(took, key=lambda name: took[name])
    text = (
        f"Quantization changes the layers' outputs by {stats.median(took.values()):.1%} of their size in the "
        f"median layer, by {took[worst]:.1%} at most ({worst})"
    )
    back = {n: loss.given_back for n, loss in losses.items() if loss.given_back is not None}
    if not back:
        return text + ("; this adapter has nothing to give back there." if adapter else ".")
    best, least = max(back, key=lambda n: back[n]), min(back, key=lambda n: back[n])
    middle = stats.median(back.values())
    if abs(middle) < 0.005 and back[best] < 0.005:
        return text + "; this adapter gives nothing of it back."
    return text + (
        f"; this adapter gives {_share(middle)} of that back in the median layer, most in {best} "
        f"({_share(back[best])}), least in {least} ({_share(back[least])})."
    )


def describe(loss: QuantizationLoss) -> str:
    """One layer's numbers."""
    back = "" if loss.given_back is None else f", {_share(loss.given_back)} given back"
    return f"{loss.of_outputs:.2%} of the outputs, {loss.of_weight:.2%} of the weight{back}"


def _share(value: float) -> str:
    text = f"{value:.0%}"
    return "0%" if text == "-0%" else text.replace("-", "−")


def _norm(matrix: Tensor, moment: Tensor) -> float:
    """``|M Sx^(1/2)|_F``."""
    return math.sqrt(max(0.0, float(((moment @ matrix.mT).mT * matrix).sum())))


def _double(matrix: Tensor) -> Tensor:
    return linalg.double_precision(matrix).cpu()
