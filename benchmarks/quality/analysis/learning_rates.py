"""How wide the range of good learning rates is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from benchmarks.quality.analysis.curves import good_range
from benchmarks.quality.analysis.intervals import mean
from benchmarks.quality.analysis.lines import finite, ordered
from benchmarks.quality.analysis.markdown import number, table
from benchmarks.quality.records import Record


def good_ranges(records: Iterable[Record]) -> dict[str, float]:
    """By method: decades of good learning rates, mean over tasks."""
    widths: dict[str, list[float]] = defaultdict(list)
    for (_, label), points in scores_by_rate(records).items():
        widths[label].append(good_range(list(points), list(points.values())))
    return {label: mean(values) for label, values in widths.items()}


def scores_by_rate(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, float]]:
    """Exact match on validation, mean over seeds, by task and method, then by learning rate."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        value = finite(record["validation"]["exact"])
        scores[record["task"], record["label"]][record["learning_rate"]].append(value)
    return {
        key: {rate: mean(values) for rate, values in sorted(points.items())}
        for key, points in scores.items()
    }


def range_table(records: Iterable[Record]) -> str:
    """Good range of learning rates, from the search: exact match on validation."""
    records = list(records)
    widths, scores = good_ranges(records), scores_by_rate(records)
    rows = []
    for label in ordered(widths):
        best = {
            max(points, key=lambda rate: float(np.nan_to_num(points[rate])))
            for (_, name), points in scores.items()
            if name == label
        }
        rates = ", ".join(f"{rate:.2g}" for rate in sorted(best))
        rows.append([label, number(widths[label], 2), rates])
    return table(["method", "decades within 2% of its best", "best rates, over tasks"], rows)
