"""Scores over rank, training samples and statistics sequences, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot

from benchmarks.quality.analysis.intervals import mean
from benchmarks.quality.analysis.lines import collect_lines, ordered, paired
from benchmarks.quality.analysis.plotting import save_with_legend, style_of
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
