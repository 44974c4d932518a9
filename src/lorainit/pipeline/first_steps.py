"""Adam's first two steps on a model: gradients and losses where they lead."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from lorainit.calibration.adam_steps import AdamSteps, Gradient, clip
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.data.sampling import Sample
from lorainit.errors import NonFiniteError, TargetError
from lorainit.models.displacement import LowRank, displaced
from lorainit.parallel import collectives
from lorainit.pipeline.measurements import Measurements
from lorainit.statistics.collection import PlannedCollection
from lorainit.types import Factors

RATE_NEEDS = frozenset({"gradient"})


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
        quiet = replace(measurements.settings, progress=False, on_unused="default")
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
        # A few sequences may reach none of the layers that others do.
        with (
            contextlib.suppress(TargetError),
            torch.no_grad(),
            displaced(self.measurements.subject.modules, self._terms(at)),
        ):
            for part in self.batches[step].parts():
                for name in part.names:
                    if name in at:
                        found[name] = self.steps[name].gradient(part[name].gradient, at[name])
                # Nobody holds it while the next one is made.
                del part
        for name in at.keys() - found.keys():
            found[name] = torch.zeros_like(at[name].A), torch.zeros_like(at[name].B)
        clip(found)
        return found

    def loss(self, at: Mapping[str, Factors]) -> float:
        """Of the held-back sequences."""
        with self.held_out.measuring() as loss:
            return loss(self._terms(at))

    def is_finite(self, at: Mapping[str, Factors]) -> bool:
        """Whether there is a second gradient to take: after too long a step there may be none.

        Where sequences without a finite loss are skipped, the gradient says it itself.
        """
        if self.measurements.settings.on_nonfinite == "skip":
            return True
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
            try:
                second = self.gradients(1, one)
            except NonFiniteError:
                # Of sums over all processes, so all of them see it.
                return math.inf
            # Made again for the second step: meanwhile their place is free.
            del one
            return self.loss(
                {n: step.after_two(rate, first[n], second[n]) for n, step in self.steps.items()}
            )

        return self.loss(start), after
