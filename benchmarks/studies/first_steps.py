"""Which first steps tell the rate of a whole run: losses after one and two steps, at every rate.

    python -m benchmarks.studies.first_steps --data DATA --model PACKED --out OUT --methods vanilla pissa \
        --tasks gcd --set rank=8 style=chat

For each task, line and rank a start is made as the referee makes it. On its first training sequences the loss
is measured after Adam's first two steps, at eleven rates: both gradients from sequences of their own
(``apart``); a start that moves the model, from its own ``A`` and ``B = 0`` (``base``); with ``--more`` from the
same sequences (``same``) and after one step (``one``). One JSON line each in ``OUT/first_steps.jsonl``.

    python -m benchmarks.studies.first_steps --suggestions

makes records of suggestions (``benchmarks.quality.suggestions``) of these curves, by the package's rule; with
``--every-rate`` from all eleven rates in place of four. ``benchmarks.quality.suggested --suggestions OUT`` sets
them beside the grid.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lorainit
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.measured_starts import Batches, add_lines, measure_lines, started
from benchmarks.quality.records import Record, append, head, read_records
from lorainit.calibration.learning_rate import find_learning_rate
from lorainit.pipeline.first_steps import FirstSteps
from lorainit.pipeline.rate import steps_of
from lorainit.types import Factors

RATES = tuple(2e-5 * 2**k for k in range(11))
"""Peak rates."""

_EVERY = {"_FIRST": RATES[0], "_GROWTH": 2.0, "_TRIED": len(RATES), "_HIGHEST": len(RATES) - 1}
"""What the package would try, to have all of them."""

CURVES = Path(__file__).parent / "results"

SEQUENCES = 128
"""A quarter for each step's gradient, half to measure on."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_lines(parser)
    parser.add_argument("--more", action="store_true", help="variants that were given up")
    parser.add_argument("--suggestions", action="store_true", help="from the kept curves")
    parser.add_argument("--every-rate", action="store_true", help="with --suggestions")
    options = parser.parse_args()
    if options.suggestions:
        law = "lorainit.calibration.learning_rate"
        with mock.patch.multiple(law, **_EVERY) if options.every_rate else nullcontext():
            for record in read_records([CURVES], "first_steps").values():
                append(options.out, suggestion(record), "suggestions")
        return
    measure_lines(options, "first_steps", partial(curves, more=options.more), 8.0)


def suggestion(record: Record) -> Record:
    """What the package suggests of a line, from its kept curves."""
    line, found = Experiment.from_json(record["experiment"]), record["curves"]
    measured_length = bool(getattr(line.build_method(), "calibrated", False))
    start, *losses = found["base" if measured_length and "base" in found else "apart"]
    known = dict(zip(record["rates"], losses, strict=True))

    def after(rate: float) -> float:
        nearest = min(known, key=lambda r: abs(math.log(r / rate)))
        value = known[nearest] if abs(nearest / rate - 1) < 1e-3 else None
        # Where nothing was measured: below, steps are short; above, and where it is not finite, too long.
        return start if rate < min(known) else math.inf if value is None else value

    rate = find_learning_rate(start, after, SEQUENCES // 2)
    about = {key: record[key] for key in ("commit", "device", "versions")}
    return head(line, "suggestions") | about | {"suggestion": asdict(rate)}


def curves(model: Any, line: Experiment, batches: Batches, *, more: bool) -> dict[str, Any]:
    """Losses of one start by variant, each before the first step and at every rate, and the seconds."""
    began = time.perf_counter()
    with (
        started(model, line, batches) as wrapped,
        mock.patch(
            "lorainit.pipeline.suggest_learning_rate.measured_rate", partial(measured, more=more)
        ),
    ):
        ready = time.perf_counter()
        found: Any = lorainit.suggest_learning_rate(
            wrapped, batches, max_sequences=SEQUENCES, progress=False
        )
        ended = time.perf_counter()
    return {"rates": RATES, "curves": found, "start": ready - began, "seconds": ended - ready}


def measured(
    measurements: Any, sample: Any, factors: Mapping[str, Factors], *_: Any, more: bool, **__: Any
) -> dict[str, list[float]]:
    """In the place of the package's own."""
    given, held = sample.held_back(0.5)
    layers = measurements.targets.layers
    steps = steps_of(factors, layers)
    apart = FirstSteps.on(measurements, steps, given, held)
    found = {"apart": losses(apart.curve())}
    if more:
        same = replace(apart, batches=(apart.batches[0], apart.batches[0]))
        found |= {"one": losses(after_one(apart)), "same": losses(same.curve())}
    if any(not s.start.anchored and bool(s.start.B.any()) for s in steps.values()):
        base = steps_of(factors, layers, from_base=True)
        found["base"] = losses(replace(apart, steps=base).curve())
    return found


def after_one(first: FirstSteps) -> tuple[float, Callable[[float], float]]:
    start = {name: step.start for name, step in first.steps.items()}
    gradients = first.gradients(0, start)
    return first.loss(start), lambda rate: first.loss(
        {n: step.after_one(rate, gradients[n]) for n, step in first.steps.items()}
    )


def losses(curve: tuple[float, Callable[[float], float]]) -> list[float]:
    start, after = curve
    return [start, *map(after, RATES)]


if __name__ == "__main__":
    main()
