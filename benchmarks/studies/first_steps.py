"""Which first steps tell the rate of a whole run: losses after one and two steps, at every rate.

    python -m benchmarks.studies.first_steps --data DATA --model PACKED --out OUT --methods vanilla pissa \
        --tasks gcd --set rank=8 style=chat

For each task, line and rank a start is made as the referee makes it. On its first training sequences the loss
is measured after Adam's first two steps, at eleven rates: both gradients from sequences of their own
(``apart``); a start that moves the model, from its own ``A`` and ``B = 0`` (``base``); with ``--more`` from the
same sequences (``same``) and after one step (``one``). One JSON line each in ``OUT/first_steps.jsonl``.

    python -m benchmarks.studies.first_steps --suggestions

makes records of suggestions (``benchmarks.quality.suggestions``) of these curves, by the package's rule.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lorainit
from benchmarks.quality import stages
from benchmarks.quality.arguments import add_common, assignment
from benchmarks.quality.data.files import load_pools
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser, lora_config, take_out
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import defaults, kind_of, model_of
from benchmarks.quality.records import Record, append, head, provenance, read_records
from benchmarks.quality.stacks import statistics_batch
from benchmarks.quality.time_limit import Clock, OutOfTime
from lorainit.calibration.adam_steps import AdamSteps
from lorainit.calibration.learning_rate import find_learning_rate
from lorainit.pipeline.first_steps import FirstSteps
from lorainit.types import Factors

RATES = tuple(2e-5 * 2**k for k in range(11))
"""Peak rates."""

CURVES = Path(__file__).parent / "results"

SEQUENCES = 128
"""A quarter for each step's gradient, half to measure on."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--methods", nargs="+", default=list(stages.METHODS))
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE")
    parser.add_argument("--more", action="store_true", help="variants that were given up")
    parser.add_argument("--suggestions", action="store_true", help="from the kept curves")
    options = parser.parse_args()
    if options.suggestions:
        for record in read_records([CURVES], "first_steps").values():
            append(options.out, suggestion(record), "suggestions")
        return
    clock = Clock(options.time_limit)
    done = read_records([*options.records, options.out], "first_steps")
    common = dict(map(assignment, options.set))
    name = common.get("model") or model_of(options.tasks)
    model = load_model(options.model, choose_device(), name)
    initialiser = Initialiser(model, batch_size=min(32, statistics_batch(model)))
    try:
        for task in options.tasks:
            train = load_pools(task, options.data, name)["train"].to(model.device)
            for method, settings in map(stages.parse_method, options.methods):
                line = Experiment(task, method, 1.0, settings=settings, **(defaults(task) | common))
                if line.id in done:
                    continue
                clock.check(8.0)
                record = head(line, "first_steps") | provenance(options.commit, model.device)
                batches = initialiser.batches(line, train)
                record |= curves(model, line, batches, more=options.more)
                append(options.out, record, "first_steps")
                print(task, line.label, line.rank, f"{record['seconds']:.1f} s", flush=True)
            initialiser.forget()
    except OutOfTime:
        print("time limit; call again")


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


def curves(
    model: Any, line: Experiment, batches: list[dict[str, Tensor]], *, more: bool
) -> dict[str, Any]:
    """Losses of one start by variant, each before the first step and at every rate, and the seconds."""
    kind_of(line.model).seed_head(model, line.seed)
    torch.manual_seed(line.seed)
    began = time.perf_counter()
    wrapped = lorainit.get_peft_model(
        model,
        lora_config(line),
        method=line.build_method(),
        data=batches,
        max_sequences=None,
        progress=False,
    )
    started = time.perf_counter()
    try:
        with mock.patch(
            "lorainit.pipeline.suggest_learning_rate.measured_rate", partial(measured, more=more)
        ):
            found: Any = lorainit.suggest_learning_rate(
                wrapped, batches, max_sequences=SEQUENCES, progress=False
            )
    finally:
        take_out(wrapped, model)
    ended = time.perf_counter()
    return {"rates": RATES, "curves": found, "start": started - began, "seconds": ended - started}


def measured(
    measurements: Any, sample: Any, factors: Mapping[str, Factors], *_: Any, more: bool, **__: Any
) -> dict[str, list[float]]:
    """In the place of the package's own."""
    given, held = sample.held_back(0.5)
    layers = measurements.targets.layers
    steps = {
        name: AdamSteps(
            replace(pair, A=pair.A.float(), B=pair.B.float()), layers[name].spec.scaling
        )
        for name, pair in factors.items()
        if name in layers
    }
    apart = FirstSteps.on(measurements, steps, given, held)
    found = {"apart": losses(apart.curve())}
    if more:
        same = replace(apart, batches=(apart.batches[0], apart.batches[0]))
        found |= {"one": losses(after_one(apart)), "same": losses(same.curve())}
    if any(not s.start.anchored and bool(s.start.B.any()) for s in steps.values()):
        base = {
            name: replace(step, start=replace(step.start, B=torch.zeros_like(step.start.B)))
            for name, step in steps.items()
        }
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
