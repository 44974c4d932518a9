"""What the figures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.quality.analysis.lines import ordered
from benchmarks.quality.stages import BASELINE

matplotlib.use("Agg")

DEFAULT = "auto"
"""The line that stands out: what `lorainit.get_peft_model` does unless told."""


def style_of(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """How a method is drawn among others: plain LoRA in black, the default in bold blue."""
    if label in (BASELINE, DEFAULT):
        return {"color": "black" if label == BASELINE else "blue", "lw": 2}
    return {"color": pyplot.get_cmap("tab20")(list(labels).index(label) % 20)}


def grid(count: int) -> tuple[Figure, Any]:
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
