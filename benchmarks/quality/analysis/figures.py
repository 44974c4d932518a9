"""Figures of the quality benchmark; what is in them stands in ``tables.md`` too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.quality.analysis.intervals import mean, stratified
from benchmarks.quality.analysis.lines import Line, axes_of, finite, ordered, paired
from benchmarks.quality.analysis.plotting import DEFAULT, grid, save_with_legend, style_of
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def differences(models: Mapping[str, Mapping[tuple[str, str], Line]], path: Path) -> Path:
    """Every method's final score beside plain LoRA's, mean over tasks, with its 95% interval.

    One panel a model, the methods in the order of their means. A method is in a panel if all tasks of
    plain LoRA have it, with seeds enough for an interval.
    """
    panels = {name: found for name, lines in models.items() if (found := _intervals(lines))}
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(5.2 * max(1, len(panels)), 4.6), squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=False):
        tasks = len({task for task, label in models[name] if label == BASELINE})
        for place, (_, middle, low, high) in enumerate(rows):
            color = "tab:green" if low > 0 else "tab:red" if high < 0 else "tab:gray"
            axis.plot([low, high], [place, place], color=color, lw=2)
            axis.plot([middle], [place], marker="o", color=color)
        axis.axvline(0, color="black", lw=1)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
        for tick, row in zip(axis.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row[0] == DEFAULT else "normal")
        axis.set_xlabel("points above plain LoRA, test split")
        axis.set_title(f"{name}, mean of {tasks} tasks", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _intervals(lines: Mapping[tuple[str, str], Line]) -> list[tuple[str, float, float, float]]:
    tasks = sorted({task for task, label in lines if label == BASELINE})
    found = []
    for label in {label for _, label in lines} - {BASELINE}:
        if not all((task, label) in lines for task in tasks):
            continue
        groups = [
            [100 * d for d in paired(lines[task, label], lines[task, BASELINE])] for task in tasks
        ]
        low, high = stratified(groups)
        if np.isfinite(low):
            found.append((label, mean([mean(group) for group in groups]), low, high))
    return sorted(found, key=lambda row: row[1])


def figures(
    lines: dict[tuple[str, str], Line], search: list[Record], out: Path, name: str
) -> list[Path]:
    """Held-out loss over the steps, and validation score over the learning rate, task by task.

    The files are called after `name`.
    """
    made = []
    if lines:
        tasks, labels = axes_of(lines)
        figure, axes = grid(len(tasks))
        for axis, task in zip(axes, tasks, strict=False):
            for label in labels:
                line = lines.get((task, label))
                if line is None:
                    continue
                steps = line.heldout[0][0]
                values = np.array([c[1] for c in line.heldout if c[0] == steps])
                axis.plot(steps, values.mean(0), label=label, **style_of(label, labels))
            axis.set(title=task, xlabel="step", ylabel="held-out loss", xscale="symlog")
            axis.set_yscale("log")
        made.append(save_with_legend(figure, axes, out / f"curves-{name}.png"))
    if search:
        tasks = sorted({r["task"] for r in search})
        labels = ordered({r["label"] for r in search})
        figure, axes = grid(len(tasks))
        for axis, task in zip(axes, tasks, strict=False):
            for label in labels:
                points: dict[float, list[float]] = defaultdict(list)
                for record in search:
                    if record["task"] == task and record["label"] == label:
                        value = finite(record["validation"]["exact"])
                        points[record["learning_rate"]].append(100 * value)
                rates = sorted(points)
                scores = [mean(points[rate]) for rate in rates]
                axis.plot(rates, scores, marker=".", label=label, **style_of(label, labels))
            axis.set(title=task, xlabel="learning rate", ylabel="exact match, %", xscale="log")
        made.append(save_with_legend(figure, axes, out / f"learning-rates-{name}.png"))
    return made
