"""A learning rate for factors, from a sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from lorainit.adapters.layers import configurations
from lorainit.adapters.match_learning_rate import resize_for
from lorainit.adapters.origin import remember_measured
from lorainit.adapters.targets import Target
from lorainit.calibration.adam_steps import AdamSteps
from lorainit.calibration.learning_rate import LearningRate, find_learning_rate
from lorainit.data.sampling import Sample
from lorainit.errors import AdapterError, DataError
from lorainit.parallel import collectives
from lorainit.pipeline.first_steps import FirstSteps
from lorainit.pipeline.measurements import Measurements
from lorainit.types import Factors

SEQUENCES = 128
"""So many are looked at unless more are asked for: a rate is found to a factor, not to a digit."""

_SHARE = 0.5
"""Of the sequences: measured on; half of the others give each step's gradient."""


def measured_rate(
    measurements: Measurements,
    sample: Sample,
    factors: Mapping[str, Factors],
    heads: Collection[str] = (),
    resized: float = 1.0,
    *,
    from_base: bool = False,
) -> LearningRate:
    """The rate for these factors; the adapters of the model are switched off.

    Args:
        measurements: of the model, its adapter off.
        sample: of the data.
        factors: by target name; targets without factors stay where they are.
        heads: names of heads that are trained in full beside the adapter.
        resized: the factors are so many times what they were started as (`match_learning_rate`): the rate is
            that of the adapter as it was started, so many times.
        from_base: step from ``B = 0`` all the same, see `stands_at_measured_length`.

    Raises:
        DataError: there are heads, too few sequences, or no rate lowers the loss.
        AdapterError: factors are on the meta device.
    """
    if heads:
        # By two steps of training a third of what it gains is lost on sentences (docs/learning_rate.md).
        raise DataError(
            f"no learning rate can be suggested for an adapter with a head of its own ('{min(heads)}'): the "
            "first steps say little of a run there (docs/learning_rate.md). Compare a few between "
            "1e-4 and 5e-3."
        )
    given, held = sample.held_back(_SHARE)
    layers = measurements.targets.layers
    steps = steps_of(factors, layers, resized, from_base=from_base)
    hidden = None if measurements.settings.progress else True
    with tqdm(desc="learning rate", unit="rate", disable=hidden) as bar:
        start, after = FirstSteps.on(measurements, steps, given, held).curve()

        def counted(rate: float) -> float:
            loss = after(rate)
            bar.update()
            return loss

        sequences = int(collectives.sum_counts([held.sequences])[0])
        return find_learning_rate(start, counted, sequences).for_factors_times(resized)


def steps_of(
    factors: Mapping[str, Factors],
    layers: Mapping[str, Target],
    resized: float = 1.0,
    *,
    from_base: bool = False,
) -> dict[str, AdamSteps]:
    """The steps of every layer that has factors; see `measured_rate`.

    Raises:
        AdapterError: factors are on the meta device.
    """
    steps = {}
    for name, pair in factors.items():
        if name not in layers:
            continue
        if pair.A.is_meta or pair.B.is_meta:
            raise AdapterError(
                f"layer '{name}': the adapter's factors are on the meta device, and no learning rate can "
                "be measured for them. Suggest it before the model is offloaded, or let get_peft_model "
                "do it (suggest_rate=True)."
            )
        dtype = torch.promote_types(pair.A.dtype, torch.float32)
        a, b = (half.to(dtype) for half in (pair.A, pair.B))
        if resized != 1:
            a, b = a / resized, b / resized
        b = torch.zeros_like(b) if from_base and not pair.anchored else b
        scaling = layers[name].spec.scaling * resized**2
        steps[name] = AdamSteps(Factors(a, b, pair.anchored), scaling)
    return steps


def factors_norm(factors: Mapping[str, Factors]) -> float:
    """Root of the sum of squares of all entries."""
    halves = [half.float() for pair in factors.values() for half in (pair.A, pair.B)]
    return float(torch.nn.utils.get_total_norm(halves)) if halves else 0.0


def stands_at_measured_length(
    model: nn.Module, adapter_name: str, factors: Mapping[str, Factors]
) -> bool:
    """Whether a start moves the model by a length that was measured, and was not trained since.

    Along it the loss is at its least already, so from there steps soon lead upwards, at rates at which a run
    goes on falling: such a start is told the rate that its rows want where the model is the base.
    """
    origin = getattr(configurations(model)[adapter_name], "origin", None)
    norm = None if origin is None else origin.measured.get("factors_norm")
    if not isinstance(norm, int | float) or not norm > 0:
        return False
    if any(half.is_meta for pair in factors.values() for half in (pair.A, pair.B)):
        return False
    return abs(factors_norm(factors) / norm - 1) < 1e-3


def rate_if_any(
    measurements: Measurements,
    sample: Sample,
    factors: Mapping[str, Factors],
    heads: Collection[str] = (),
    *,
    from_base: bool = False,
) -> LearningRate | str:
    """The rate from the first `SEQUENCES` of a sample, or why there is none: a start does not fail for it."""
    try:
        sample = sample.first(SEQUENCES)
        return measured_rate(measurements, sample, factors, heads, from_base=from_base)
    except DataError as error:
        return str(error)


def matched(
    model: nn.Module, adapter_name: str, rate: LearningRate | str, learning_rate: float
) -> str:
    """Resize an adapter so that a rate suits it that was chosen elsewhere; what to say of it.

    Args:
        model: holds the adapter.
        adapter_name: of the adapter.
        rate: what suits it as it is, or why nothing is known: then it is left as it is.
        learning_rate: the rate that it will be trained at.
    """
    if isinstance(rate, str):
        return f"not matched to the learning rate {learning_rate:.3g}: {rate}"
    before = configurations(model)[adapter_name].lora_alpha
    remember_measured(model, adapter_name, rate.measured())
    k = resize_for(model, adapter_name, rate.value, learning_rate)
    after = configurations(model)[adapter_name].lora_alpha
    return (
        f"matched to the learning rate {learning_rate:.3g}: factors times {k:.3g}, lora_alpha {before:.4g} to "
        f"{after:.4g}; as configured {rate.value:.2g} would suit it, measured on {rate.sequences} sequences"
    )
