"""The stage "grid": every line at every rate, compared by test loss first.

The rate of each line and task is the one with the least validation loss, mean over seeds. A difference from
plain LoRA is of test losses at each one's own best rate, seed by seed on the same data and order. On one task
it is judged by Welch's t over seeds; over tasks by a t test of the tasks' mean differences, corrected by Holm
over the lines. So an interval over tasks says what to expect of tasks like these, not of these alone.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

Cells = Mapping[str, Mapping[str, Mapping[float, Mapping[int, Record]]]]
"""Task, label, rate, seed."""

LEVEL = 0.05


def cells_of(
    records: Iterable[Record], stage: str = "grid", rates: Collection[float] | None = None
) -> Cells:
    """Records in order; a seed that has not run at every rate of its task is left out.

    Args:
        records: of all stages.
        stage: theirs.
        rates: alone; None: all that there are.
    """
    found: dict[str, dict[str, dict[float, dict[int, Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for record in records:
        if record["stage"] == stage and (rates is None or record["learning_rate"] in rates):
            place = found[record["task"]][record["label"]][record["learning_rate"]]
            place[record["seed"]] = record
    for lines in found.values():
        every = {rate for line in lines.values() for rate in line}
        for label, line in lines.items():
            whole = set.intersection(*(set(line.get(rate, ())) for rate in every))
            lines[label] = defaultdict(
                dict, {r: {s: m[s] for s in whole} for r, m in line.items() if whole}
            )
        for label in [label for label, line in lines.items() if not line]:
            del lines[label]
    return found


def loss_of(record: Record, split: str = "test") -> float:
    """A run that diverged has no loss: infinitely bad."""
    value = record[split]["loss"]
    return math.inf if value is None else float(value)


def best_rate(rates: Mapping[float, Mapping[int, Record]]) -> float:
    """Of the rates with all seeds, the one with the least mean validation loss."""
    whole = max(map(len, rates.values()))
    means = {
        rate: statistics.mean(loss_of(r, "validation") for r in members.values())
        for rate, members in rates.items()
        if len(members) == whole
    }
    return min(means, key=lambda rate: means[rate])


def tuned_loss(rates: Mapping[float, Mapping[int, Record]]) -> float:
    """Mean test loss over seeds at the best rate."""
    return statistics.mean(loss_of(r) for r in rates[best_rate(rates)].values())


@dataclass(frozen=True)
class Difference:
    """A line against plain LoRA on one task, each at its best rate.

    Attributes:
        task: its name.
        seeds: that both have.
        loss: mean difference of the test loss, nats; negative is better.
        exact: of the exact match, points.
        log_ratio: mean of the logarithm of the ratio of test losses.
        standardised: the difference in deviations of plain LoRA between seeds.
        p: of Welch's t over seeds.
        rate: the line's best.
    """

    task: str
    seeds: int
    loss: float
    exact: float
    log_ratio: float
    standardised: float
    p: float
    rate: float


def difference(
    task: str,
    line: Mapping[float, Mapping[int, Record]],
    base: Mapping[float, Mapping[int, Record]],
) -> Difference:
    rate, plain = best_rate(line), best_rate(base)
    seeds = sorted(set(line[rate]) & set(base[plain]))
    mine = [loss_of(line[rate][s]) for s in seeds]
    theirs = [loss_of(base[plain][s]) for s in seeds]
    exact = [
        100 * (line[rate][s]["test"]["exact"] - base[plain][s]["test"]["exact"]) for s in seeds
    ]
    deviation = statistics.stdev(theirs) if len(seeds) > 1 else math.nan
    gap = statistics.mean(mine) - statistics.mean(theirs)
    p = math.nan
    if len(seeds) > 1 and all(map(math.isfinite, mine)):
        p = float(stats.ttest_ind(mine, theirs, equal_var=False).pvalue)
    return Difference(
        task,
        len(seeds),
        gap,
        statistics.mean(exact),
        statistics.mean(math.log(a / b) for a, b in zip(mine, theirs, strict=True)),
        gap / deviation if deviation else math.nan,
        p,
        rate,
    )


def differences(cells: Cells) -> dict[str, list[Difference]]:
    """By label, of every task that has both the line and plain LoRA."""
    found: dict[str, list[Difference]] = defaultdict(list)
    for task, lines in sorted(cells.items()):
        if BASELINE not in lines:
            continue
        for label, rates in lines.items():
            if label != BASELINE:
                found[label].append(difference(task, rates, lines[BASELINE]))
    return found


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values corrected by Holm's step-down method."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    found, largest = {}, 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        found[name] = largest
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% t interval of the mean."""
    if len(values) < 2:
        return (math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return statistics.mean(values) - reach, statistics.mean(values) + reach


def task_level_p(values: Sequence[float]) -> float:
    return float(stats.ttest_1samp(values, 0.0).pvalue) if len(values) > 1 else math.nan


def compared(cells: Cells) -> list[tuple[str, list[Difference], float, float]]:
    """Every line, best first: its differences from plain LoRA, p over tasks, and that corrected by Holm."""
    found = differences(cells)
    ps = {label: task_level_p([d.loss for d in tasks]) for label, tasks in found.items()}
    corrected = holm({label: p for label, p in ps.items() if not math.isnan(p)})
    order = sorted(found, key=lambda label: statistics.mean(d.loss for d in found[label]))
    return [(label, found[label], ps[label], corrected.get(label, math.nan)) for label in order]


def comparison(cells: Cells) -> str:
    """Every line against plain LoRA, over tasks."""
    rows = []
    for label, tasks, p, corrected in compared(cells):
        losses = [100 * d.loss for d in tasks]
        low, high = interval(losses)
        points = [d.exact for d in tasks]
        worse = sum(d.p < LEVEL and d.loss > 0 for d in tasks)
        better = sum(d.p < LEVEL and d.loss < 0 for d in tasks)
        rows.append(
            [
                label,
                f"{len(tasks)} x {min(d.seeds for d in tasks)}",
                f"{statistics.mean(losses):+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{statistics.mean(d.log_ratio for d in tasks):+.4f}",
                f"{statistics.mean(points):+.2f} [{interval(points)[0]:+.2f}, {interval(points)[1]:+.2f}]",
                f"{p:.2g}",
                f"{corrected:.2g}",
                f"{sum(d.loss < 0 for d in tasks)}",
                f"{better} / {worse}",
            ]
        )
    heads = [
        "line", "tasks x seeds", "test loss, hundredths of a nat", "mean log ratio", "exact match, points",
        "p over tasks", "Holm", "tasks below", "tasks significantly below / above",
    ]  # fmt: skip
    return table(heads, rows)


def common_tasks(cells: Cells) -> Cells:
    """The tasks on which every line has run, so that means over tasks are of the same tasks."""
    labels = {label for lines in cells.values() for label in lines}
    return {task: lines for task, lines in cells.items() if set(lines) == labels}


def by_rate(cells: Cells, value: str = "loss") -> tuple[list[float], dict[str, list[float]]]:
    """Mean over tasks at every fixed rate.

    Args:
        cells: records.
        value: ``"loss"``: test loss above plain LoRA's at its own best rate, nats; ``"exact"``: percent.
    """
    rates = sorted({rate for lines in cells.values() for line in lines.values() for rate in line})
    labels = sorted({label for lines in cells.values() for label in lines})
    found: dict[str, list[float]] = {}
    for label in labels:
        row = []
        for rate in rates:
            values = []
            for lines in cells.values():
                members = lines.get(label, {}).get(rate)
                if not members or BASELINE not in lines:
                    continue
                if value == "exact":
                    values.append(
                        100 * statistics.mean(r["test"]["exact"] for r in members.values())
                    )
                    continue
                plain = lines[BASELINE][best_rate(lines[BASELINE])]
                base = statistics.mean(loss_of(r) for r in plain.values())
                values.append(statistics.mean(loss_of(r) for r in members.values()) - base)
            row.append(statistics.mean(values) if values else math.nan)
        found[label] = row
    return rates, found


def rate_table(cells: Cells, value: str = "loss") -> str:
    """Line by rate, as a paper that fixes one rate would have seen it."""
    rates, found = by_rate(cells, value)
    form = "{:.3f}" if value == "loss" else "{:.1f}"
    rows = [
        [label, *("diverged" if math.isinf(v) else form.format(v) for v in values)]
        for label, values in sorted(
            found.items(), key=lambda item: min(item[1]) if value == "loss" else -max(item[1])
        )
    ]
    return table(["line", *(f"{rate:g}" for rate in rates)], rows)


def task_table(cells: Cells) -> str:
    """Test loss at each line's best rate, by task."""
    labels = sorted(
        {label for lines in cells.values() for label in lines}, key=lambda n: (n != BASELINE, n)
    )
    rows = []
    for task, lines in sorted(cells.items()):
        row = [task]
        for label in labels:
            if label not in lines:
                row.append("")
                continue
            rate = best_rate(lines[label])
            row.append(
                f"{statistics.mean(loss_of(r) for r in lines[label][rate].values()):.4f} @ {rate:g}"
            )
        rows.append(row)
    return table(["task", *labels], rows)
