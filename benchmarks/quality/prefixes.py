"""One run of many natural steps, and every number of steps on the way as a start of its own.

The first steps of a longer run are the steps of a shorter one, to the bit (tests/test_refinement.py),
so a benchmark need not take them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lorainit.probing import Probe
from lorainit.refinement import NaturalSteps

from benchmarks.quality.experiment import Experiment
from benchmarks.quality.stacked import Start
from lorainit.statistics import Statistics
from lorainit.types import Factors


@dataclass
class Prefixes:
    """What was there after each step.

    Attributes:
        starts: factors by number of steps, from one.
        seconds: since the recording began, recording aside.
    """

    starts: list[Start] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def after(self, steps: int) -> tuple[Start, float]:
        """Start and seconds of so many steps; of fewer, where no more went down."""
        index = min(steps, len(self.starts)) - 1
        return self.starts[index], self.seconds[index]


def steps_of(experiment: Experiment) -> int:
    return int(experiment.settings.get("steps", 1))


def but_steps(experiment: Experiment) -> Any:
    """What Natural's experiments share whose starts differ in the number of steps alone; else None."""
    if experiment.method != "natural":
        return None
    rest = {k: v for k, v in experiment.settings.items() if k != "steps"}
    whole = experiment.at(settings=rest, learning_rate=1.0, steps=0, warmup=0.0).to_json()
    return json.dumps(whole, sort_keys=True)


def longest(experiment: Experiment, together: Sequence[Experiment]) -> Experiment:
    """Of these, the one with the most natural steps whose first steps are this one's."""
    own = but_steps(experiment)
    if own is None:
        return experiment
    return max(
        [experiment, *(e for e in together if but_steps(e) == own)], key=lambda e: steps_of(e)
    )


@contextmanager
def recorded() -> Iterator[Prefixes]:
    """Inside, every natural step is kept."""
    found, take = Prefixes(), NaturalSteps.take
    began, aside = _now(), 0.0

    def and_keep(self: NaturalSteps, statistics: Statistics, probe: Probe) -> object:
        nonlocal aside
        result = take(self, statistics, probe)
        found.seconds.append(_now() - began - aside)
        found.starts.append(_start(self.factors()))
        aside = _now() - began - found.seconds[-1]
        return result

    NaturalSteps.take = and_keep  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        NaturalSteps.take = take  # type: ignore[method-assign]


def _start(factors: dict[str, Factors]) -> Start:
    return Start({name: (pair.A.clone(), pair.B.clone()) for name, pair in factors.items()}, {})


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
