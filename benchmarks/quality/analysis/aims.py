"""Every method against the best of all others."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.quality.analysis.intervals import bootstrap, mean
from benchmarks.quality.analysis.learning_rates import good_ranges
from benchmarks.quality.analysis.lines import Lines, collect_lines, ordered, paired
from benchmarks.quality.analysis.markdown import number, table
from benchmarks.quality.experiment import FULL
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def aims_table(lines: Lines, search: Iterable[Record] = (), few_shot: Iterable[Record] = ()) -> str:
    """Every method against the best of all others, plain LoRA among them.

    A method with other settings is not another method, nor are Natural and Auto (`family`); full
    fine-tuning is the upper line, no start of an adapter.

    Steps to plain LoRA's final loss (median over runs) and early loss above it (mean) as a share of the
    best other's; tasks on which the score is above and significantly below the best other's (of that
    task, by its mean); the good range of learning rates beside plain LoRA's; tasks on which few-shot
    training scores above every other.
    """
    lines = {key: line for key, line in lines.items() if key[1] != FULL}
    labels = ordered({label for _, label in lines})
    share = {label: _median_share(lines, label) for label in labels}
    early = {
        label: mean([mean(x.early) for (_, n), x in lines.items() if n == label])
        for label in labels
    }
    width = good_ranges(search)
    few = collect_lines(few_shot)
    rows = []
    for label in labels:
        others = [name for name in labels if family(name) != family(label)]
        if not others:
            continue
        above, below, seen = against_best(lines, label)
        rows.append(
            [
                label,
                _ratio(share[label], min(share[name] for name in others)),
                _ratio(early[label], min(early[name] for name in others)),
                f"{above} above, {below} significantly below, of {seen}",
                f"{number(width.get(label, math.nan), 2)} / {number(width.get(BASELINE, math.nan), 2)}",
                _few_shot(few, label),
            ]
        )
    header = [
        "method", "steps to LoRA's final loss, % of the best other's",
        "early loss above it, % of the best other's", "tasks, against the best other",
        "good range of learning rates, decades / LoRA's", "few-shot: tasks above every other",
    ]  # fmt: skip
    return table(header, rows)


def against_best(lines: Lines, label: str) -> tuple[int, int, int]:
    """Tasks on which a method is above the best other one of that task, significantly below it, and all."""
    above = below = seen = 0
    for task in sorted({t for t, name in lines if name == label}):
        peers = [
            x
            for (t, n), x in lines.items()
            if t == task and n != FULL and family(n) != family(label)
        ]
        if not peers:
            continue
        seen += 1
        differences = paired(
            lines[task, label], max(peers, key=lambda line: (mean(line.exact), line.label))
        )
        above += mean(differences) > 0
        below += bootstrap(differences)[1] < 0
    return above, below, seen


def family(label: str) -> str:
    """The method of a line, whatever its settings; Auto is Natural or plain LoRA."""
    name = label.split("(")[0]
    return "natural" if name == "auto" else name


def _median_share(lines: Lines, label: str) -> float:
    shares = [
        to / line.heldout[i][0][-1]
        for (_, name), line in lines.items()
        if name == label
        for i, to in enumerate(line.steps_to)
    ]
    return float(np.median(shares)) if shares else math.nan


def _ratio(mine: float, best: float) -> str:
    """In percent; a start below plain LoRA's final loss has no sensible ratio and says so."""
    if not (math.isfinite(mine) and math.isfinite(best)):
        return "never" if math.isinf(mine) else "–"
    if best <= 0:
        return "the best other is at or below it"
    return f"{100 * mine / best:.0f}%"


def _few_shot(lines: Lines, label: str) -> str:
    tasks = sorted({task for task, name in lines if name == label})
    wins = sum(
        mean(lines[task, label].exact)
        > max(
            (
                mean(x.exact)
                for (t, n), x in lines.items()
                if t == task and family(n) != family(label)
            ),
            default=1.0,
        )
        for task in tasks
    )
    return f"{wins} of {len(tasks)}" if tasks else "–"
