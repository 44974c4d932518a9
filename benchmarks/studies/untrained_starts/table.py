"""The share of the loss gap that starts close, in Markdown."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def table(done: dict[str, Record]) -> str:
    """Mean and spread (standard deviation) over seeds, in Markdown."""
    records = list(done.values())
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record)
    trained: dict[tuple[str, int], Record] = {}
    for task in {r["task"] for r in kinds["trained"]}:
        mine = [r for r in kinds["trained"] if r["task"] == task]
        by_rate: dict[float, list[float]] = defaultdict(list)
        for r in mine:
            loss = r["validation"]["loss"]
            by_rate[r["learning_rate"]].append(1e9 if loss is None else loss)
        rate = min(by_rate, key=lambda x: float(np.mean(by_rate[x])))
        trained |= {(task, r["seed"]): r for r in mine if r["learning_rate"] == rate}
    base = {(r["task"], r["seed"]): r for r in kinds["start"] if r["label"] == BASELINE}
    matched = {(r["task"], r["seed"], r["label"]): r for r in kinds["matched"]}
    rows: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for r in kinds["start"]:
        at = (r["task"], r["seed"])
        if r["label"] == BASELINE or at not in trained or at not in base:
            continue
        gap = base[at]["loss"] - trained[at]["loss"]
        same = matched.get((*at, r["label"]))
        rows[r["task"], r["label"]].append(
            [
                base[at]["loss"],
                r["loss"],
                trained[at]["loss"],
                100 * (base[at]["loss"] - r["loss"]) / gap,
                100 * r["exact"],
                100 * trained[at]["exact"],
                r["init_seconds"],
                100 * (base[at]["loss"] - same["loss"]) / gap if same else np.nan,
                100 * same["exact"] if same else np.nan,
            ]
        )
    header = (
        "task | start | base loss | start loss | LoRA trained | gap closed, % | exact, % | "
        "LoRA's exact, % | seconds | LoRA, same data and time: gap closed, % | its exact, %"
    )
    lines = [f"| {header} |", "|" + " --- |" * 11]
    for (task, label), values in sorted(rows.items()):
        data = np.array(values)
        cells = []
        for column in data.T:
            column = column[~np.isnan(column)]
            spread = f" ± {column.std(ddof=1):.2f}" if len(column) > 1 else ""
            cells.append(f"{column.mean():.2f}{spread}" if len(column) else "–")
        lines.append(f"| {task} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
