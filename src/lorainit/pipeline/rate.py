"""A learning rate for factors, from a sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import nn

from lorainit.adapters.layers import configurations
from lorainit.adapters.match_learning_rate import resize_for
from lorainit.adapters.origin import remember_measured
from lorainit.calibration.learning_rate import LearningRate, find_learning_rate
from lorainit.calibration.sign_step import SignStep
from lorainit.data.sampling import Sample
from lorainit.errors import DataError
from lorainit.parallel import collectives
from lorainit.pipeline.measurements import Measurements
from lorainit.types import Factors

RATE_NEEDS = frozenset({"gradient"})

SEQUENCES = 64
"""So many are looked at unless more are asked for: a rate is found to a factor, not to a digit."""

_SHARE = 0.5
"""Of the sequences: measured on; the others give the gradient."""


def measured_rate(
    measurements: Measurements,
    sample: Sample,
    factors: Mapping[str, Factors],
    heads: Collection[str] = (),
    resized: float = 1.0,
) -> LearningRate:
    """The rate for these factors; the adapters of the model are switched off.

    Args:
        measurements: of the model, at its base.
        sample: of the data.
        factors: by target name; targets without factors stay where they are.
        heads: names of heads that are trained in full beside the adapter.
        resized: the factors are so many times what they were started as (`match_learning_rate`): the rate is
            that of the adapter as it was started, so many times.

    Raises:
        DataError: there are heads, too few sequences, or no rate lowers the loss.
    """
    if heads:
        # Measured: by it a third of what training gains was lost on sentences (docs/learning_rate.md).
        raise DataError(
            f"no learning rate can be suggested for an adapter with a head of its own ('{min(heads)}'): the "
            "rate of one step says little of a run there (docs/learning_rate.md). Compare a few between "
            "1e-4 and 5e-3."
        )
    given, held = sample.held_back(_SHARE)
    layers = measurements.targets.layers
    steps: dict[str, SignStep] = {}
    with torch.no_grad():
        for part in replace(measurements, needs=RATE_NEEDS, gather=True).planned(given).parts():
            for name in part.names:
                if name in factors:
                    pair, scaling = factors[name], layers[name].spec.scaling
                    if resized != 1:
                        pair = replace(pair, A=pair.A / resized, B=pair.B / resized)
                        scaling *= resized**2
                    steps[name] = SignStep.of(pair, scaling, part[name].gradient)
    sequences = int(collectives.sum_counts([held.sequences])[0])
    rate = find_learning_rate(steps, measurements.held_out_loss(held), sequences)
    return rate.for_factors_times(resized)


def rate_if_any(
    measurements: Measurements,
    sample: Sample,
    factors: Mapping[str, Factors],
    heads: Collection[str] = (),
) -> LearningRate | str:
    """The rate from the first `SEQUENCES` of a sample, or why there is none: a start does not fail for it."""
    try:
        return measured_rate(measurements, sample.first(SEQUENCES), factors, heads)
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
