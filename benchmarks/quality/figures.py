"""Figures of the quality benchmark; what is in them stands in ``tables.md`` too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.quality.analyze import Line, axes_of, finite, mean, ordered, paired, stratified
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

DEFAULT = "auto"
"""The line that stands out: what `lorainit.get_peft_model` does unless told."""


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
        figure, axes = _grid(len(tasks))
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
        figure, axes = _grid(len(tasks))
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


def style_of(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """How a method is drawn among others: plain LoRA in black, the default in bold blue."""
    if label in (BASELINE, DEFAULT):
        return {"color": "black" if label == BASELINE else "blue", "lw": 2}
    return {"color": pyplot.get_cmap("tab20")(list(labels).index(label) % 20)}


def _grid(count: int) -> tuple[Figure, Any]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows))
    return figure, np.atleast_1d(axes).ravel()


def save_with_legend(figure: Figure, axes: Any, path: Path) -> Path:
    """One legend for all panels, below them."""
    known = {}
    for axis in axes:
        known |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.set_visible(bool(axis.lines))
    labels = ordered(known)
    lines = -(-len(labels) // 5)
    handles = [known[label] for label in labels]
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, (0.25 + 0.2 * lines) / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
