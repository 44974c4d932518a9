"""A learning rate for factors, from a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from lorainit.adapters.layers import configurations
from lorainit.adapters.match_learning_rate import resize_for
from lorainit.adapters.origin import remember_measured
from lorainit.calibration.adam_steps import AdamSteps, Gradient, clip
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.learning_rate import LearningRate, find_learning_rate
from lorainit.data.sampling import Sample
from lorainit.errors import DataError
from lorainit.models.displacement import LowRank, displaced
from lorainit.parallel import collectives
from lorainit.pipeline.measurements import Measurements
from lorainit.statistics.collection import PlannedCollection
from lorainit.types import Factors

RATE_NEEDS = frozenset({"gradient"})

SEQUENCES = 128
"""So many are looked at unless more are asked for: a rate is found to a factor, not to a digit."""

_SHARE = 0.5
"""Of the sequences: measured on; half of the others give each step's gradient."""


@dataclass(frozen=True, eq=False)
class FirstSteps:
    """The loss after Adam's first two steps, on a model whose adapter is off.

    Attributes:
        measurements: of the model, needing gradients.
        steps: by target name; other targets stay as they are.
        batches: that give the gradient of the first step and of the second.
        ahead: the loss that the second gradient is of.
        held_out: the loss that is measured.
    """

    measurements: Measurements
    steps: Mapping[str, AdamSteps]
    batches: tuple[PlannedCollection, PlannedCollection]
    ahead: HeldOutLoss
    held_out: HeldOutLoss

    @classmethod
    def on(
        cls, measurements: Measurements, steps: Mapping[str, AdamSteps], given: Sample, held: Sample
    ) -> FirstSteps:
        """On these sequences: `given` for gradients, a half a step, `held` for losses."""
        quiet = replace(measurements.settings, progress=False)
        measurements = replace(measurements, needs=RATE_NEEDS, settings=quiet, gather=True)
        units = collectives.sum_counts([sum(batch.units for batch in given.batches)])[0]
        # The same halves, however many processes share the sequences.
        given = given.with_batches(given.batches)
        halves = given.held_back(0.5) if units > 1 else (given, given)
        # Beside the collection's sums there are two gradients and a moved pair of factors.
        factors = (half for step in steps.values() for half in (step.start.A, step.start.B))
        room = 3 * sum(half.numel() * half.element_size() for half in factors)
        first, second = (measurements.planned(half, room) for half in halves)
        ahead, held_out = map(measurements.held_out_loss, (halves[1], held))
        return cls(measurements, steps, (first, second), ahead, held_out)

    def gradients(self, step: int, at: Mapping[str, Factors]) -> dict[str, Gradient]:
        """Of all factors at `at`, zero where no sequence reaches a layer; clipped."""
        found: dict[str, Gradient] = {}
        with torch.no_grad(), displaced(self.measurements.subject.modules, self._terms(at)):
            for part in self.batches[step].parts():
                for name in part.names:
                    if name in at:
                        gradient = part[name].gradient
                        found[name] = self.steps[name].gradient(gradient, at[name])
        for name in at.keys() - found.keys():
            found[name] = torch.zeros_like(at[name].A), torch.zeros_like(at[name].B)
        clip(found)
        return found

    def loss(self, at: Mapping[str, Factors]) -> float:
        """Of the held-back sequences."""
        with self.held_out.measuring() as loss:
            return loss(self._terms(at))

    def is_finite(self, at: Mapping[str, Factors]) -> bool:
        """Whether there is a second gradient to take: after too long a step there may be none."""
        with self.ahead.measuring() as loss:
            return math.isfinite(loss(self._terms(at)))

    def _terms(self, at: Mapping[str, Factors]) -> dict[str, LowRank]:
        return {name: step.term(at[name]) for name, step in self.steps.items()}

    def curve(self) -> tuple[float, Callable[[float], float]]:
        """The loss before the first step, and after two as a function of the peak rate."""
        start = {name: step.start for name, step in self.steps.items()}
        first = self.gradients(0, start)

        def after(rate: float) -> float:
            one = {n: step.after_one(rate, first[n]) for n, step in self.steps.items()}
            if not self.is_finite(one):
                return math.inf
            second = self.gradients(1, one)
            # Made again for the second step: meanwhile their place is free.
            del one
            return self.loss(
                {n: step.after_two(rate, first[n], second[n]) for n, step in self.steps.items()}
            )

        return self.loss(start), after


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
        from_base: step from ``B = 0`` all the same, see `has_measured_length`.

    Raises:
        DataError: there are heads, too few sequences, or no rate lowers the loss.
    """
    if heads:
        # By two steps of training a third of what it gains is lost on sentences (docs/learning_rate.md).
        raise DataError(
            f"no learning rate can be suggested for an adapter with a head of its own ('{min(heads)}'): the "
            "first steps say little of a run there (docs/learning_rate.md). Compare a few between "
            "1e-4 and 5e-3."
        )
    given, held = sample.held_back(_SHARE)
    layers, steps = measurements.targets.layers, {}
    for name, pair in factors.items():
        if name in layers:
            scaling = layers[name].spec.scaling * resized**2
            dtype = torch.promote_types(pair.A.dtype, torch.float32)
            a, b = (half.to(dtype) for half in (pair.A, pair.B))
            if resized != 1:
                a, b = a / resized, b / resized
            b = torch.zeros_like(b) if from_base and not pair.anchored else b
            steps[name] = AdamSteps(Factors(a, b, pair.anchored), scaling)
    hidden = None if measurements.settings.progress else True
    with tqdm(desc="learning rate", unit="rate", disable=hidden) as bar:
        start, after = FirstSteps.on(measurements, steps, given, held).curve()

        def counted(rate: float) -> float:
            loss = after(rate)
            bar.update()
            return loss

        sequences = int(collectives.sum_counts([held.sequences])[0])
        return find_learning_rate(start, counted, sequences).for_factors_times(resized)


def has_measured_length(model: nn.Module, adapter_name: str) -> bool:
    """Whether the start moves the model, by a length that was measured.

    Along it the loss is at its least already, so from there steps soon lead upwards, at rates at which a run
    goes on falling: such a start is told the rate that its rows want where the model is the base.
    """
    origin = getattr(configurations(model)[adapter_name], "origin", None)
    return origin is not None and "start_loss" in origin.measured


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
