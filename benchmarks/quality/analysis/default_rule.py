"""The rule by which a method becomes the default (benchmarks/README.md), asked of the records."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from benchmarks.quality.analysis.aims import against_best
from benchmarks.quality.analysis.intervals import RESAMPLES, mean, sign_flip, stratified
from benchmarks.quality.analysis.learning_rates import good_ranges
from benchmarks.quality.analysis.lines import Lines, collect_lines, ordered, paired
from benchmarks.quality.analysis.markdown import number, table
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

_NEVER = 2.0
"""Of the steps, where a run never reaches plain LoRA's final loss."""

SAME_RANGE = 0.02
"""Decades by which ranges of learning rates are as wide as one another: the same start, searched twice on
the sentence model, differs by 0.01."""


def rule_table(models: Mapping[str, Sequence[Record]]) -> str:
    """Every method that all tasks of all models have, and why it is out, if it is.

    Args:
        models: the records of each model.
    """
    found = {
        model: collect_lines([r for r in records if r["stage"] == "seeds"])
        for model, records in models.items()
    }
    ranges = {
        model: good_ranges([r for r in records if r["stage"] == "search"])
        for model, records in models.items()
    }
    tasks = {(model, task) for model, lines in found.items() for task, _ in lines}
    rows = []
    for label in ordered({name for lines in found.values() for _, name in lines}):
        if {(m, t) for m, lines in found.items() for t, n in lines if n == label} != tasks:
            continue
        below = {m: against_best(lines, label)[1] for m, lines in found.items()}
        narrow = [
            m for m, r in ranges.items() if r.get(label, 0.0) < r.get(BASELINE, 0.0) - SAME_RANGE
        ]
        low, high = _ratio_of_medians(found, label)
        reasons = [f"below the best other on {n} tasks of {m}" for m, n in below.items() if n]
        reasons += [f"narrower range on {m}" for m in narrow]
        if not reasons and label != BASELINE and not high < 1:
            reasons = ["no fewer steps than plain LoRA"]
        early = mean(
            [mean(x.early) for m in found.values() for (_, n), x in m.items() if n == label]
        )
        share = float(np.median(np.concatenate(_steps(found, label))))
        rows.append(
            [
                label,
                "out: " + "; ".join(reasons) if reasons else "left",
                f"{100 * share:.0f}%",
                "" if label == BASELINE else f"{low:.2f} to {high:.2f}",
                number(early),
                "" if label == BASELINE else _above(found, label),
            ]
        )
    header = [
        "method", "by the rule", "steps to LoRA's final loss, median",
        "over plain LoRA's, 95%", "early loss above LoRA's final",
        "points above plain LoRA over all tasks, 95%, p",
    ]  # fmt: skip
    return table(header, rows)


def fresh_table(models: Mapping[str, Sequence[Record]], fresh: Collection[str]) -> str:
    """Points above plain LoRA over the tasks of choice, the fresh ones, and all: of methods that all have.

    Args:
        models: the records of each model, fresh tasks by themselves or not.
        fresh: names of the tasks that no choice was made on.
    """
    found = {
        model: collect_lines([r for r in records if r["stage"] == "seeds"])
        for model, records in models.items()
    }
    tasks = {task for lines in found.values() for task, name in lines if name == BASELINE}
    rows = []
    for label in ordered({name for lines in found.values() for _, name in lines} - {BASELINE}):
        known = {task for lines in found.values() for task, name in lines if name == label}
        if not tasks <= known:
            continue
        parts = (tasks - set(fresh), tasks & set(fresh), tasks)
        cells = [
            _above(
                {m: {k: v for k, v in x.items() if k[0] in part} for m, x in found.items()}, label
            )
            for part in parts
        ]
        rows.append([label, *cells])
    sizes = (len(tasks - set(fresh)), len(tasks & set(fresh)), len(tasks))
    names = ("tasks of choice", "fresh tasks", "all tasks")
    header = [f"{name} ({size}): points, 95%, p" for name, size in zip(names, sizes, strict=True)]
    return table(["method", *header], rows)


def _above(found: Mapping[str, Lines], label: str) -> str:
    """Mean over tasks of the paired differences in test score, its interval, and a sign-flip test."""
    groups = [
        [100 * d for d in paired(line, lines[task, BASELINE])]
        for lines in found.values()
        for (task, name), line in sorted(lines.items())
        if name == label
    ]
    low, high = stratified(groups)
    p = sign_flip([d for group in groups for d in group])
    return f"{mean([mean(g) for g in groups]):+.2f} [{low:+.2f}, {high:+.2f}], {p:.2g}"


def _steps(found: Mapping[str, Lines], label: str) -> list[list[float]]:
    """Share of the steps until plain LoRA's final loss, by task and run."""
    return [
        [
            min(_NEVER, to / curve[0][-1])
            for to, curve in zip(line.steps_to, line.heldout, strict=True)
        ]
        for lines in found.values()
        for (_, name), line in sorted(lines.items())
        if name == label
    ]


def _ratio_of_medians(found: Mapping[str, Lines], label: str) -> tuple[float, float]:
    """95% interval of a method's median over plain LoRA's, runs resampled within each task."""
    mine, plain = _steps(found, label), _steps(found, BASELINE)
    if not mine or min(map(len, mine)) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(0)
    ratios = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        picks = [generator.integers(0, len(g), len(g)) for g in mine]
        drawn = [np.asarray(g)[pick] for g, pick in zip(mine, picks, strict=True)]
        base = [np.asarray(g)[pick % len(g)] for g, pick in zip(plain, picks, strict=True)]
        ratios[index] = np.median(np.concatenate(drawn)) / np.median(np.concatenate(base))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)
