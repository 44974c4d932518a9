"""Forgetting in the stage "grid": the loss on another task after fine-tuning, at each line's best rate.

The rise is from the base's loss: plain LoRA's before its first step, on the same seed. Both lines of a
comparison have that same base, so the difference of their rises is one of losses after training.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.quality.analysis.lines import finite
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import Cells, Pair, labels_of, pairs
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.records import Record


def with_other(found: Pair) -> list[tuple[Record, Record]]:
    """Runs of the line and of plain LoRA on one seed, both with a loss on another task."""
    both = zip(found.mine, found.base, strict=True)
    return [(a, b) for a, b in both if "other" in a and "other" in b]


def rises_of(found: Pair) -> Iterator[tuple[float, float, float]]:
    """By seed: the line's rise, plain LoRA's, and the line's test loss above plain LoRA's."""
    for mine, base in with_other(found):
        start = finite(base["other"]["start_loss"])
        yield (
            finite(mine["other"]["loss"]) - start,
            finite(base["other"]["loss"]) - start,
            finite(mine["test"]["loss"]) - finite(base["test"]["loss"]),
        )


def grid_forgetting_table(cells: Cells) -> str:
    """Every line's rise of the loss on another task beside plain LoRA's; empty where none was recorded."""
    rows = []
    for label in labels_of(cells):
        tasks = []
        for found in pairs(cells, label):
            if seeds := list(rises_of(found)):
                tasks.append([statistics.mean(column) for column in zip(*seeds, strict=True)])
        if tasks:
            mine, base, test = zip(*tasks, strict=True)
            gaps = [a - b for a, b in zip(mine, base, strict=True)]
            rows.append(
                (
                    statistics.mean(test),
                    [
                        label,
                        f"{len(tasks)}",
                        str(Mean.of(test)),
                        f"{statistics.mean(mine):+.3f}",
                        f"{statistics.mean(base):+.3f}",
                        str(Mean.of(gaps)),
                        f"{sum(gap < 0 for gap in gaps)}",
                    ],
                )
            )
    heads = [
        "line, at its best rate", "tasks", "test loss beside plain LoRA's", "rise of another task's loss",
        "plain LoRA's rise", "rise beside plain LoRA's", "tasks with a smaller rise",
    ]  # fmt: skip
    return table(heads, [row for _, row in sorted(rows, key=lambda r: r[0])]) if rows else ""
