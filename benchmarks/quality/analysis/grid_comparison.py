"""Lines of the stage "grid" against plain LoRA: over tasks, and on each of them.

A difference is of test losses at each one's own best rate, over the same seeds and out of the same rates (see
`rate_grid`). Over tasks it is judged by a t test of the tasks' mean differences, corrected by Holm over the
lines: what to expect of tasks like these, not of these alone; what seeds and test items add to a task's figure
is part of the spread between tasks, and so of that interval.

On one task two things are uncertain. Seeds: Welch's t over them. Test items, which all runs of a task share: of
the exact match every item is kept, so the standard error of the mean item difference is added to that of the
seeds (it holds some of the seeds' noise again, so the interval is rather too wide). Of the loss only each run's
standard error over items is kept. Two runs err alike on the same items, so the root of the sum of both squares
bounds the items' part from above; it stands in a column of its own, and the interval beside it is of these test
items.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from scipy import stats

from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import Cells, Pair, labels_of, loss_of, pairs
from benchmarks.quality.analysis.t_tests import (
    Mean,
    around,
    holm,
    task_level_p,
    welch_error,
    with_error,
)
from benchmarks.quality.records import Record

LEVEL = 0.05

POINTS = 100.0


@dataclass(frozen=True)
class Difference:
    """A line against plain LoRA on one task, each at its best rate.

    Attributes:
        pair: what is compared.
        loss: mean difference of the test loss, nats; negative is better.
        low: of its 95% Welch interval over seeds, on these test items.
        high: the same.
        item_bound: standard error of the loss over items, at most.
        exact: of the exact match, points.
        exact_low: of its 95% interval over seeds and items.
        exact_high: the same.
        log_ratio: mean of the logarithm of the ratio of test losses.
        standardised: the difference in deviations of plain LoRA between seeds.
        p: of Welch's t over seeds.
    """

    pair: Pair
    loss: float
    low: float
    high: float
    item_bound: float
    exact: float
    exact_low: float
    exact_high: float
    log_ratio: float
    standardised: float
    p: float

    @property
    def task(self) -> str:
        return self.pair.task

    @property
    def seeds(self) -> int:
        return len(self.pair.seeds)


def difference(found: Pair) -> Difference:
    mine, theirs = [loss_of(r) for r in found.mine], [loss_of(r) for r in found.base]
    exact, base = ([POINTS * r["test"]["exact"] for r in runs] for runs in (found.mine, found.base))
    several = len(found.seeds) > 1
    finite = several and all(map(math.isfinite, mine + theirs))
    gap = statistics.mean(mine) - statistics.mean(theirs)
    points = statistics.mean(exact) - statistics.mean(base)
    low, high = around(gap, *welch_error(mine, theirs)) if finite else (math.nan, math.nan)
    error = with_error(*welch_error(exact, base), *item_error(found))
    exact_low, exact_high = around(points, *error)
    deviation = statistics.stdev(theirs) if several else math.nan
    return Difference(
        found,
        gap,
        low,
        high,
        math.sqrt(_square_of_errors(found.mine) + _square_of_errors(found.base)),
        points,
        exact_low,
        exact_high,
        statistics.mean(math.log(a / b) for a, b in zip(mine, theirs, strict=True)),
        gap / deviation if deviation else math.nan,
        float(stats.ttest_ind(mine, theirs, equal_var=False).pvalue) if finite else math.nan,
    )


def items_of(record: Record) -> np.ndarray:
    """Whether each item of the test split was right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["test"]["items"]), dtype=np.uint8))
    return bits[: record["test"]["sequences"]].astype(float)


def item_error(found: Pair) -> tuple[float, float]:
    """Standard error over items of the difference in exact match, points, and its degrees of freedom."""
    runs = [*found.mine, *found.base]
    if any("items" not in r["test"] for r in runs):
        return math.nan, math.nan
    mine, base = (np.mean([items_of(r) for r in side], 0) for side in (found.mine, found.base))
    gaps = POINTS * (mine - base)
    return float(gaps.std(ddof=1) / math.sqrt(len(gaps))), len(gaps) - 1


def _square_of_errors(runs: list[Record]) -> float:
    """Mean square of the runs' errors over items, which more seeds on the same items do not lower."""
    errors = [r["test"].get("loss_error") for r in runs]
    return statistics.mean(math.nan if e is None else float(e) ** 2 for e in errors)


def differences(cells: Cells) -> dict[str, list[Difference]]:
    """By label, of every task that has both the line and plain LoRA."""
    found = {label: [difference(p) for p in pairs(cells, label)] for label in labels_of(cells)}
    return {label: tasks for label, tasks in found.items() if tasks}


def compared(cells: Cells) -> list[tuple[str, list[Difference], float, float]]:
    """Every line, best first: its differences from plain LoRA, p over tasks, and that corrected by Holm."""
    found = differences(cells)
    ps = {label: task_level_p([d.loss for d in tasks]) for label, tasks in found.items()}
    corrected = holm({label: p for label, p in ps.items() if not math.isnan(p)})
    order = sorted(found, key=lambda label: statistics.mean(d.loss for d in found[label]))
    return [(label, found[label], ps[label], corrected.get(label, math.nan)) for label in order]


def comparison(cells: Cells, score: str = "exact match") -> str:
    """Every line against plain LoRA, over tasks."""
    rows = []
    for label, tasks, p, corrected in compared(cells):
        worse = sum(d.p < LEVEL and d.loss > 0 for d in tasks)
        better = sum(d.p < LEVEL and d.loss < 0 for d in tasks)
        counts = sorted({len(d.pair.rates) for d in tasks})
        told = [d.standardised for d in tasks if math.isfinite(d.standardised)]
        rows.append(
            [
                label,
                f"{len(tasks)} x {min(d.seeds for d in tasks)}",
                " to ".join(str(c) for c in dict.fromkeys((counts[0], counts[-1]))),
                Mean.of([100 * d.loss for d in tasks]).rounded(2),
                f"{statistics.mean(d.log_ratio for d in tasks):+.4f}",
                f"{statistics.mean(told):+.2f}" if told else "–",
                Mean.of([d.exact for d in tasks]).rounded(2),
                f"{p:.2g}",
                f"{corrected:.2g}",
                f"{sum(d.loss < 0 for d in tasks)}",
                f"{better} / {worse}",
                f"{sum(d.pair.at_edge for d in tasks)}",
            ]
        )
    heads = [
        "line", "tasks x least seeds", "rates", "test loss, hundredths of a nat", "mean log ratio",
        "deviations between seeds", f"{score}, points", "p over tasks", "Holm", "tasks below",
        "tasks significantly below / above", "best rate at the edge",
    ]  # fmt: skip
    return table(heads, rows)


def by_task(cells: Cells, score: str = "exact match") -> str:
    """Every line on every task on which two seeds or more are shared."""
    rows = []
    for label, tasks, _, _ in compared(cells):
        for d in tasks:
            if d.seeds < 2:
                continue
            rows.append(
                [
                    label,
                    d.task,
                    f"{d.seeds}",
                    f"{d.pair.rate:g} / {d.pair.base_rate:g}",
                    f"{d.loss:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
                    "–" if math.isnan(d.item_bound) else f"{d.item_bound:.4f}",
                    f"{d.exact:+.1f}"
                    + (
                        ""
                        if math.isnan(d.exact_low)
                        else f" [{d.exact_low:+.1f}, {d.exact_high:+.1f}]"
                    ),
                ]
            )
    heads = [
        "line", "task", "seeds", "rate / plain LoRA's", "test loss [95% over seeds]",
        "its error over items, at most", f"{score}, points [95% over seeds and items]",
    ]  # fmt: skip
    return table(heads, rows) if rows else ""
