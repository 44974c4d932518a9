"""Line by rate: what a paper that fixes one rate would have seen, and what is left after tuning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.quality.analysis.grid_comparison import compared
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import Cells, Line, best_rate, loss_of
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.stages import BASELINE

FIXED = (1e-4, 2e-4)
"""Rates that papers fix for all methods."""


def common_tasks(cells: Cells) -> Cells:
    """The tasks on which every line has run, so that means over tasks are of the same tasks.

    While these are less than half of plain LoRA's tasks, the line with the fewest tasks is left out.
    """
    whole = {task: lines for task, lines in cells.items() if BASELINE in lines}
    labels = {label for lines in whole.values() for label in lines}
    while True:
        found = {task: lines for task, lines in whole.items() if labels <= set(lines)}
        if 2 * len(found) >= len(whole) or len(labels) == 1:
            return {
                task: {x: lines[x] for x in lines if x in labels} for task, lines in found.items()
            }
        rest = sorted(labels - {BASELINE})
        labels -= {min(rest, key=lambda label: sum(label in lines for lines in whole.values()))}


def by_rate(cells: Cells, value: str = "loss") -> tuple[list[float], dict[str, list[float]]]:
    """Mean over tasks at every fixed rate.

    Args:
        cells: records.
        value: ``"loss"``: test loss above plain LoRA's at its own best rate, nats, over the seeds that both
            have there; ``"exact"``: percent.
    """
    rates = sorted({rate for lines in cells.values() for line in lines.values() for rate in line})
    labels = sorted({label for lines in cells.values() for label in lines})
    found: dict[str, list[float]] = {}
    for label in labels:
        row = []
        for rate in rates:
            values = [
                _at(lines[label], lines[BASELINE], rate, value)
                for lines in cells.values()
                if label in lines and BASELINE in lines
            ]
            told = [v for v in values if v is not None]
            # A mean is of all tasks, or there is none.
            row.append(statistics.mean(told) if len(told) == len(values) and told else math.nan)
        found[label] = row
    return rates, found


def _at(line: Line, base: Line, rate: float, value: str) -> float | None:
    members = line.get(rate)
    if not members:
        return None
    if value == "exact":
        return 100 * statistics.mean(r["test"]["exact"] for r in members.values())
    plain = base[best_rate(base)]
    seeds = set(members) & set(plain)
    return (
        statistics.mean(loss_of(members[s]) - loss_of(plain[s]) for s in seeds) if seeds else None
    )


def rate_table(cells: Cells, value: str = "loss") -> str:
    """Line by rate, as a paper that fixes one rate would have seen it."""
    rates, found = by_rate(cells, value)
    form = "{:.3f}" if value == "loss" else "{:.1f}"

    def shown(v: float) -> str:
        return "diverged" if math.isinf(v) else "–" if math.isnan(v) else form.format(v)

    def best(values: Sequence[float]) -> float:
        told = [v if value == "loss" else -v for v in values if not math.isnan(v)]
        return min(told, default=math.inf)

    order = sorted(found, key=lambda label: best(found[label]))
    rows = [[label, *map(shown, found[label])] for label in order]
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
            mean = statistics.mean(loss_of(r) for r in lines[label][rate].values())
            row.append(f"{mean:.4f} @ {rate:g}")
        rows.append(row)
    return table(["task", *labels], rows)


def gaps_at(cells: Cells, label: str, rate: float) -> list[float]:
    """Test loss of a line above plain LoRA's, both at one rate, by task: mean over the seeds that both have."""
    found = []
    for _, lines in sorted(cells.items()):
        if label in lines and BASELINE in lines:
            mine, plain = (lines[name].get(rate, {}) for name in (label, BASELINE))
            if seeds := set(mine) & set(plain):
                found.append(statistics.mean(loss_of(mine[s]) - loss_of(plain[s]) for s in seeds))
    return found


def claims_at_rates(cells: Cells, rates: Sequence[float] = FIXED) -> str:
    """The claim of a lower final loss in both forms: with one rate for all, and with each line tuned."""
    rows = []
    for label, tasks, _, _ in compared(cells):
        columns = [gaps_at(cells, label, rate) for rate in rates]
        columns.append([d.loss for d in tasks])
        rows.append([label, *map(_shown, columns)])
    return table(["line", *(f"both at {rate:g}" for rate in rates), "each tuned"], rows)


def _shown(gaps: Sequence[float]) -> str:
    """A mean with its interval, and on how many tasks it is below zero."""
    mean = Mean.of(gaps) if gaps else None
    return "–" if mean is None else f"{mean} ({mean.below} of {mean.tasks})"
