"""Ranks in the stage "grid": each line beside plain LoRA at the same rank, each at its best rate.

On the tasks that have been run at another rank than the standard one, at the rates of `LEAST` alone, so that
every rank has the same tasks and rates where it has run them; a cell says on how many tasks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.quality.analysis.grid_comparison import difference
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import (
    LEAST,
    Cells,
    Line,
    Pair,
    best_rate,
    cells_of,
    pairs,
    tuned_loss,
)
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE, STANDARD_RANK


def cells_by_rank(records: Iterable[Record]) -> dict[int, Cells]:
    """By rank, on the tasks that plain LoRA has run at another rank than the standard one."""
    records = [r for r in records if r["stage"] == "grid"]
    found = {
        rank: cells_of((r for r in records if r["rank"] == rank), rates=LEAST)
        for rank in sorted({r["rank"] for r in records})
    }
    tasks = {
        task
        for rank, cells in found.items()
        for task, lines in cells.items()
        if rank != STANDARD_RANK and BASELINE in lines
    }
    chosen = {
        rank: {task: lines for task, lines in cells.items() if task in tasks}
        for rank, cells in found.items()
    }
    return {rank: cells for rank, cells in chosen.items() if cells}


def rank_tables(records: Iterable[Record]) -> list[str]:
    """Test losses by rank, and best rates by rank; empty where one rank alone has run."""
    by_rank = cells_by_rank(records)
    others = {
        label
        for rank, cells in by_rank.items()
        for lines in cells.values()
        for label in lines
        if rank != STANDARD_RANK and label != BASELINE
    }
    if len(by_rank) < 2:
        return []
    losses, rates = [_plain_losses(by_rank)], [_plain_rates(by_rank)]
    for label in sorted(others):
        found = {rank: pairs(cells, label) for rank, cells in by_rank.items()}
        losses.append([label, *map(_beside, found.values())])
        rates.append([label, *(_middle([p.rate for p in mine]) for mine in found.values())])
    heads = [f"rank {rank}" for rank in by_rank]
    return [
        table(
            ["line: test loss beside plain LoRA's at the same rank (tasks x least seeds)", *heads],
            losses,
        ),
        table(["line: best rate, geometric mean over tasks", *heads], rates),
    ]


def _plain(cells: Cells) -> list[Line]:
    return [lines[BASELINE] for lines in cells.values() if BASELINE in lines]


def _plain_losses(by_rank: dict[int, Cells]) -> list[str]:
    row = ["plain LoRA's test loss itself"]
    for cells in by_rank.values():
        lines = _plain(cells)
        row.append(
            f"{statistics.mean(map(tuned_loss, lines)):.4f} ({len(lines)})" if lines else "–"
        )
    return row


def _plain_rates(by_rank: dict[int, Cells]) -> list[str]:
    return ["plain LoRA", *(_middle(list(map(best_rate, _plain(c)))) for c in by_rank.values())]


def _beside(found: list[Pair]) -> str:
    if not found:
        return "–"
    gaps = [difference(p).loss for p in found]
    return f"{Mean.of(gaps)} ({len(found)} x {min(len(p.seeds) for p in found)})"


def _middle(rates: list[float]) -> str:
    return f"{statistics.geometric_mean(rates):.2g}" if rates else "–"
