"""Scores over rank, training samples and statistics samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.quality.analysis.intervals import mean
from benchmarks.quality.analysis.lines import Line, collect_lines, ordered, paired
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.models.registry import defaults
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def sweep_table(records: Iterable[Record], over: str) -> str:
    """Exact match by the value of one budget, beside plain LoRA's with the same budget.

    Not every line has every task, so each is compared on the tasks that it shares with plain LoRA.
    """
    by_value: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_value[record["experiment"][over]].append(record)
    values = sorted(by_value)
    cells = {value: collect_lines(by_value[value]) for value in values}
    labels = ordered({label for lines in cells.values() for _, label in lines})
    return table(
        ["method", *map(str, values)],
        [[label, *(_sweep_cell(cells[value], label) for value in values)] for label in labels],
    )


def _sweep_cell(lines: dict[tuple[str, str], Line], label: str) -> str:
    mine = {task: line for (task, name), line in lines.items() if name == label}
    if label == BASELINE:
        scores = [mean(line.exact) for line in mine.values()]
        return f"{100 * mean(scores):.1f} ({len(scores)})" if scores else "–"
    pairs = [(line, lines[t, BASELINE]) for t, line in mine.items() if (t, BASELINE) in lines]
    groups = [found for line, base in pairs if (found := paired(line, base))]
    if not groups:
        return "–"
    return f"{100 * mean([mean(group) for group in groups]):+.1f} ({len(groups)})"


def sweeps_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By the budget that was changed: its runs, and those of the final tables at the standard value."""
    records = list(records)
    final = [r for r in records if r["stage"] == "seeds"]
    swept: dict[str, list[Record]] = {}
    for over in ("rank", "train_samples", "statistics_samples"):
        mine = [r for r in records if r["stage"] == "sweep" and swept_budget(r) == over]
        tasks, labels = {r["task"] for r in mine}, {r["label"] for r in mine}
        same = [r for r in final if r["task"] in tasks and r["label"] in labels]
        if mine and over == "statistics_samples":
            # Plain LoRA reads none: its runs stand beside every number.
            plain = [r for r in final if r["task"] in tasks and r["label"] == BASELINE]
            numbers = {r["experiment"][over] for r in mine + plain}
            same += [
                r | {"experiment": r["experiment"] | {over: count}}
                for count in numbers
                for r in plain
            ]
        if mine:
            swept[over] = mine + same
    return swept


def swept_budget(record: Record) -> str:
    """Which budget a sweep's record differs in from the standard one."""
    standard = Experiment(record["task"], record["method"], 1.0, **defaults(record["task"]))
    for over in ("rank", "train_samples", "statistics_samples"):
        if record["experiment"][over] != getattr(standard, over):
            return over
    return "rank"
