"""Rate by method: what a paper that fixes one rate would have seen, and what is left after tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from benchmarks.quality.analysis.plotting import style_of
from benchmarks.quality.analysis.rate_grid import Cells
from benchmarks.quality.analysis.rate_tables import FIXED, by_rate


def rate_figure(cells: Cells, path: Path, highest: float = 0.6, score: str = "exact match") -> Path:
    """Two panels over the rate, means over tasks: test loss above tuned plain LoRA's, and the score."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6))
    panels: Sequence[tuple[str, str]] = (
        ("loss", "test loss above plain LoRA's at its own best rate, nats"),
        ("exact", f"{score}, %"),
    )
    for axis, (value, title) in zip(axes, panels, strict=True):
        rates, found = by_rate(cells, value)
        for label, values in found.items():
            shown = [
                v if math.isfinite(v) and (value != "loss" or v < highest) else math.nan
                for v in values
            ]
            axis.plot(rates, shown, marker="o", ms=3, label=label, **style_of(label, list(found)))
        for rate in FIXED:
            axis.axvline(rate, color="0.8", lw=1, zorder=0)
        axis.set_xscale("log")
        axis.set_xlabel("learning rate (grey: 1e-4 and 2e-4, which papers fix)")
        axis.set_title(title, fontsize=10)
    axes[0].axhline(0, color="0.6", lw=1, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
