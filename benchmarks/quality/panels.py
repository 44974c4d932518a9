"""Figures of budgets, and of speed and forgetting; what is in them stands in ``tables.md`` too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.quality.analyze import collect_lines, mean, ordered, paired
from benchmarks.quality.claims import Lines, rises
from benchmarks.quality.figures import DEFAULT, save_with_legend, style_of
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

_SAID = {
    "rank": "rank",
    "train_samples": "training samples",
    "statistics_samples": "statistics sequences",
}


def sweeps(swept: Mapping[str, Sequence[Record]], path: Path) -> Path:
    """Points above plain LoRA by rank, training samples and statistics sequences, one panel each.

    A panel's means are over the tasks that plain LoRA has at all of its values; a method's line has the
    values where it has all of them.
    """
    figure, axes = pyplot.subplots(1, len(swept), figsize=(4.4 * len(swept), 3.6))
    axes = np.atleast_1d(axes).ravel()
    labels = ordered({r["label"] for records in swept.values() for r in records})
    for axis, (over, records) in zip(axes, swept.items(), strict=False):
        values = sorted({r["experiment"][over] for r in records})
        cells = {v: collect_lines(r for r in records if r["experiment"][over] == v) for v in values}
        tasks = sorted(
            set.intersection(*({t for t, name in cells[v] if name == BASELINE} for v in values))
        )
        for label in labels:
            known = [v for v in values if all((t, label) in cells[v] for t in tasks)]
            if len(known) < 2:
                continue
            above = [
                100 * mean([mean(paired(cells[v][t, label], cells[v][t, BASELINE])) for t in tasks])
                for v in known
            ]
            axis.plot(known, above, marker=".", label=label, **style_of(label, labels))
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(v) for v in values])
        axis.set(xlabel=_SAID[over], ylabel="points above plain LoRA")
        axis.set_title(f"mean of {len(tasks)} tasks", fontsize=10)
    return save_with_legend(figure, axes, path)


def beside(lines: Lines, records: Sequence[Record], path: Path) -> Path:
    """Four panels, a row a method, means over tasks: before training, how soon, at what time, what is lost.

    The loss before the first step; steps and seconds to plain LoRA's final loss, medians over runs (a
    cross at the border: most runs never reach it); the rise of the loss on another task.
    """
    tasks = {task for task, label in lines if label == BASELINE}
    known = [
        label
        for label in ordered({label for _, label in lines})
        if all((task, label) in lines for task in tasks)
    ]
    lost = rises(lines, records)
    rows: dict[str, dict[str, float]] = {name: {} for name in _PANELS}
    for label in known:
        mine = [lines[task, label] for task in sorted(tasks)]
        shares = [to / x.heldout[i][0][-1] for x in mine for i, to in enumerate(x.steps_to)]
        told = [mean(lost[x.task, label]) for x in mine if lost.get((x.task, label))]
        found = (
            mean([mean([curve[1][0] for curve in x.heldout]) for x in mine]),
            100 * float(np.median(shares)),
            float(np.median([s for x in mine for s in x.seconds_to])),
            mean(told) if told else math.nan,
        )
        for name, value in zip(_PANELS, found, strict=True):
            rows[name][label] = value
    figure, axes = pyplot.subplots(
        1, len(_PANELS), figsize=(3.2 * len(_PANELS), 1.2 + 0.21 * len(known)), sharey=True
    )
    places = range(len(known) - 1, -1, -1)
    for axis, (name, values) in zip(axes, rows.items(), strict=True):
        reached = [v for v in values.values() if math.isfinite(v)]
        border = max(reached, default=1.0) + 0.08 * (
            max(reached, default=1.0) - min(reached, default=0.0)
        )
        for place, label in zip(places, known, strict=True):
            value = values[label]
            color = {BASELINE: "black", DEFAULT: "tab:blue"}.get(label, "tab:gray")
            if math.isinf(value):
                axis.plot([border], [place], marker="x", color=color)
            elif math.isfinite(value):
                axis.plot([value], [place], marker="o", color=color)
        if math.isfinite(values.get(BASELINE, math.nan)):
            axis.axvline(values[BASELINE], color="black", lw=0.8)
        axis.set_xlabel(name, fontsize=9)
        axis.grid(axis="y", lw=0.3)
    axes[0].set_yticks(list(places), known, fontsize=8)
    for tick, label in zip(axes[0].get_yticklabels(), known, strict=True):
        tick.set_fontweight("bold" if label == DEFAULT else "normal")
    figure.suptitle(
        f"means of {len(tasks)} tasks; line: plain LoRA; cross: most runs never", fontsize=9
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


_PANELS = (
    "loss before the first step",
    "steps to plain LoRA's final loss, %",
    "seconds to it, start included",
    "rise of another task's loss",
)
