"""What fine-tuning adds to the loss on another task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from benchmarks.quality.analysis.intervals import mean
from benchmarks.quality.analysis.lines import Lines, finite, ordered
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def rises(lines: Lines, records: Iterable[Record]) -> dict[tuple[str, str], list[float]]:
    """By task and method, over seeds: what fine-tuning adds to the loss on another task, from the base's."""
    chosen: dict[tuple[str, str], list[Record]] = defaultdict(list)
    base: dict[tuple[str, int], float] = {}
    for record in records:
        if "other" not in record:
            continue
        if record["label"] == BASELINE:
            base[record["task"], record["seed"]] = finite(record["other"]["start_loss"])
        line = lines.get((record["task"], record["label"]))
        if line is not None and record["learning_rate"] == line.rate:
            chosen[record["task"], record["label"]].append(record)
    return {
        (task, label): [
            finite(r["other"]["loss"]) - base[task, r["seed"]]
            for r in mine
            if (task, r["seed"]) in base
        ]
        for (task, label), mine in chosen.items()
    }


def forgetting_table(lines: Lines, records: Iterable[Record]) -> str:
    """Rise of the loss on another task, from the base's to that after fine-tuning."""
    found = rises(lines, records)
    tasks = sorted({task for task, _ in found})
    rows = [
        [label, *(f"{mean(v):+.2f}" if (v := found.get((task, label))) else "–" for task in tasks)]
        for label in ordered({label for _, label in found})
    ]
    return table(["method", *tasks], rows)
