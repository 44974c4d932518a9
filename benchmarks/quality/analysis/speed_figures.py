"""Speed and forgetting as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.quality.analysis.forgetting import rises
from benchmarks.quality.analysis.intervals import mean
from benchmarks.quality.analysis.lines import Lines, ordered
from benchmarks.quality.analysis.plotting import DEFAULT
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def speed_and_forgetting(lines: Lines, records: Sequence[Record], path: Path) -> Path:
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
