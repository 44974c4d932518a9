"""The stage "grid": every line at every rate, and two lines side by side.

First seeds have run at nine rates, later ones at the six of `LEAST`. Two lines are compared on one task by what
both have: the seeds that both have run, and of the rates those at which each of these seeds has run in both. So
with later seeds in both lines six rates are compared, and with first seeds alone all nine. Of these rates each
line takes the one with the least validation loss, mean over the seeds; all else is read there.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from benchmarks.quality.experiment import GRID
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

Line = Mapping[float, Mapping[int, Record]]
"""Rate, seed."""

Cells = Mapping[str, Mapping[str, Line]]
"""Task, label, rate, seed."""

LEAST = GRID[2:8]
"""1e-4 to 4.6e-3: the rates that every seed that counts has run."""


def cells_of(
    records: Iterable[Record],
    stage: str = "grid",
    rates: Collection[float] | None = None,
    least: Collection[float] = LEAST,
) -> Cells:
    """Records in order; a seed that has not run at each rate of `least` is left out.

    Args:
        records: of all stages.
        stage: theirs.
        rates: alone; None: all that there are.
        least: with `rates`, those of them.
    """
    runs: dict[str, dict[str, dict[int, dict[float, Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for record in records:
        if record["stage"] == stage and (rates is None or record["learning_rate"] in rates):
            seeds = runs[record["task"]][record["label"]]
            seeds[record["seed"]][record["learning_rate"]] = record
    wanted = set(least) if rates is None else set(least) & set(rates)
    found: dict[str, dict[str, dict[float, dict[int, Record]]]] = defaultdict(dict)
    for task, lines in runs.items():
        for label, seeds in lines.items():
            line: dict[float, dict[int, Record]] = defaultdict(dict)
            for seed, members in sorted(seeds.items()):
                if wanted <= set(members):
                    for rate, record in sorted(members.items()):
                        line[rate][seed] = record
            if line:
                found[task][label] = dict(sorted(line.items()))
    return dict(found)


def loss_of(record: Record, split: str = "test") -> float:
    """A run that diverged has no loss: infinitely bad."""
    value = record[split]["loss"]
    return math.inf if value is None else float(value)


def shared(*lines: Line) -> tuple[Line, ...]:
    """Lines at the seeds that all have, and at the rates that all these seeds have in all lines."""
    seeds = set.intersection(*({s for m in line.values() for s in m} for line in lines))
    rates = [
        rate
        for rate in lines[0]
        if seeds and all(seeds <= set(line.get(rate, ())) for line in lines)
    ]
    return tuple(
        {rate: {s: line[rate][s] for s in sorted(seeds)} for rate in rates} for line in lines
    )


def best_rate(line: Line) -> float:
    """Of the rates with all seeds, the one with the least mean validation loss."""
    (whole,) = shared(line)
    means = {
        rate: statistics.mean(loss_of(r, "validation") for r in members.values())
        for rate, members in whole.items()
    }
    return min(means, key=lambda rate: means[rate])


def tuned_loss(line: Line) -> float:
    """Mean test loss over seeds at the best rate."""
    return statistics.mean(loss_of(r) for r in line[best_rate(line)].values())


@dataclass(frozen=True)
class Pair:
    """A line and plain LoRA on one task, each at its best rate.

    Attributes:
        task: its name.
        seeds: that both have.
        rates: that these seeds have run in both.
        rate: the line's best of them.
        base_rate: plain LoRA's.
        mine: the line's runs, in the order of the seeds.
        base: plain LoRA's.
    """

    task: str
    seeds: list[int]
    rates: list[float]
    rate: float
    base_rate: float
    mine: list[Record]
    base: list[Record]

    @property
    def at_edge(self) -> bool:
        """Whether the line's best rate is the lowest or the highest of those compared."""
        return self.rate in (min(self.rates), max(self.rates))


def pair(task: str, line: Line, base: Line) -> Pair | None:
    """None where the two share no seed."""
    mine, plain = shared(line, base)
    if not mine:
        return None
    rate, base_rate = best_rate(mine), best_rate(plain)
    seeds = sorted(mine[rate])
    return Pair(
        task,
        seeds,
        sorted(mine),
        rate,
        base_rate,
        [mine[rate][s] for s in seeds],
        [plain[base_rate][s] for s in seeds],
    )


def pairs(cells: Cells, label: str, base: str = BASELINE) -> list[Pair]:
    """Of every task that has both lines."""
    found = [
        pair(task, lines[label], lines[base])
        for task, lines in sorted(cells.items())
        if label in lines and base in lines
    ]
    return [p for p in found if p is not None]


def labels_of(cells: Cells) -> list[str]:
    """Every line but plain LoRA."""
    return sorted({label for lines in cells.values() for label in lines} - {BASELINE})
