"""One method on one task at its own best rate, and its comparison with plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmarks.quality.analysis.curves import area, crossing
from benchmarks.quality.analysis.intervals import bootstrap, sign_flip
from benchmarks.quality.experiment import CURVE_PERCENT
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE, best_rates


def finite(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass
class Line:
    """One method on one task, at the learning rate that validation chose; lists run over seeds."""

    task: str
    label: str
    rate: float
    seeds: list[int] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    heldout: list[tuple[list[float], list[float]]] = field(default_factory=list)
    percent: list[list[float]] = field(default_factory=list)
    init_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    steps_to: list[float] = field(default_factory=list)
    seconds_to: list[float] = field(default_factory=list)
    early: list[float] = field(default_factory=list)
    area: list[float] = field(default_factory=list)


def collect_lines(records: Iterable[Record]) -> dict[tuple[str, str], Line]:
    """All lines of one budget, with what compares them to plain LoRA's final loss."""
    records = [r for r in records if "test" in r]
    rates = best_rates(records, 1, by="exact")
    lines: dict[tuple[str, str], Line] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        key = (record["task"], record["label"])
        if record["learning_rate"] != rates[key][0]:
            continue
        line = lines.setdefault(key, Line(*key, rates[key][0]))
        line.seeds.append(record["seed"])
        line.exact.append(finite(record["test"]["exact"]))
        line.loss.append(finite(record["test"]["loss"]))
        curve = record["heldout"]
        line.heldout.append((curve["steps"], [finite(v) for v in curve["loss"]]))
        at = record["heldout_at_percent"]
        line.percent.append([finite(at[str(p)]) for p in CURVE_PERCENT])
        line.init_seconds.append(record["init_seconds"])
        line.train_seconds.append(record["train_seconds"])
    for (task, _), line in lines.items():
        base = lines.get((task, BASELINE))
        for i, (steps, losses) in enumerate(line.heldout):
            line.area.append(area(steps, losses))
            target = _final(base, line.seeds[i])
            to = crossing(steps, losses, target)
            line.steps_to.append(to)
            each = line.train_seconds[i] / steps[-1]
            line.seconds_to.append(line.init_seconds[i] + each * to)
            line.early.append(area(steps, losses, until=0.1 * steps[-1]) - target)
    return lines


def _final(base: Line | None, seed: int) -> float:
    """Plain LoRA's final held-out loss: of the same seed, else the mean."""
    if base is None:
        return math.nan
    finals = [curve[1][-1] for curve in base.heldout]
    return finals[base.seeds.index(seed)] if seed in base.seeds else float(np.mean(finals))


def compare(line: Line, base: Line) -> tuple[float, float, float, float]:
    """Mean paired difference in exact match, its interval, and the p-value."""
    differences = paired(line, base)
    low, high = bootstrap(differences)
    mean = float(np.mean(differences)) if differences else math.nan
    return mean, low, high, sign_flip(differences)


def paired(line: Line, base: Line) -> list[float]:
    """Differences in test exact match over the seeds that both have."""
    at = dict(zip(base.seeds, base.exact, strict=True))
    pairs = zip(line.seeds, line.exact, strict=True)
    return [value - at[seed] for seed, value in pairs if seed in at]


def axes_of(lines: dict[tuple[str, str], Line]) -> tuple[list[str], list[str]]:
    return sorted({t for t, _ in lines}), ordered({label for _, label in lines})


def ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda name: (name != BASELINE, name))


Lines = Mapping[tuple[str, str], Line]
