"""Auto's line on tasks where what it does follows from records that are there.

`lorainit.Auto` is Natural where the measured step takes away at least `least_gain` of the loss, and plain
LoRA where it does not. Where all of a task's runs of Natural are far on one side, a run of Auto would be
one of them, or one of plain LoRA with Natural's time to start. Runs of Auto's own go first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import lorainit
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

MARGIN = 0.4
"""Gains this near to the least, relative to it, may lie on either side on other sequences."""


def followed(records: Iterable[Record]) -> list[Record]:
    """Records of ``auto`` by task, each a copy under this label, with ``follows``: whose it is."""
    by_task: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    return [copy for mine in by_task.values() for copy in _of_task(mine)]


def gains(records: Sequence[Record]) -> list[float]:
    """Share of plain LoRA's first held-out loss that Natural has taken away, one a run of five seeds."""
    first: dict[str, dict[int, float]] = {BASELINE: {}, "natural": {}}
    for record in records:
        if record["stage"] == "seeds" and record["label"] in first:
            first[record["label"]][record["seed"]] = record["heldout_at_percent"]["0"]
    plain, natural = first[BASELINE], first["natural"]
    return [1 - natural[seed] / plain[seed] for seed in sorted(plain.keys() & natural.keys())]


def _of_task(records: Sequence[Record]) -> list[Record]:
    found = gains(records)
    if not found or any(r["label"] == "auto" for r in records):
        return []
    least = lorainit.Auto().least_gain
    if min(found) >= (1 + MARGIN) * least:
        source = "natural"
    elif max(found) <= (1 - MARGIN) * least:
        source = BASELINE
    else:
        return []
    natural = [
        r["init_seconds"] for r in records if r["label"] == "natural" and r["stage"] == "seeds"
    ]
    seconds = sum(natural) / len(natural)
    copies = [
        r | {"label": "auto", "method": "auto", "follows": source}
        for r in records
        if r["label"] == source and r["stage"] in ("search", "seeds")
    ]
    return [c | {"init_seconds": seconds} if source == BASELINE else c for c in copies]
