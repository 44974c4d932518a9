"""Which runs there are: a grid of rates on a few seeds, then all seeds at the best and the suggested rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.preference.training import SUGGESTED

Run = tuple[str, str, int]
"""Method, rate, seed."""


def known(records: Iterable[dict[str, Any]]) -> set[Run]:
    """The runs that have a record."""
    return {(r["method"], r["asked_rate"], r["seed"]) for r in records}


def best_rate(records: Iterable[dict[str, Any]], method: str) -> str | None:
    """The tried rate with the lowest loss on the validation pairs, over the seeds that every rate has."""
    rows = [
        r
        for r in records
        if r["method"] == method and r["asked_rate"] != SUGGESTED and "validation_loss" in r
    ]
    losses: dict[str, dict[int, float]] = {}
    for row in rows:
        losses.setdefault(row["asked_rate"], {})[row["seed"]] = row["validation_loss"]
    if not losses:
        return None
    common = set.intersection(*(set(found) for found in losses.values()))
    if not common:
        return None
    return min(losses, key=lambda rate: statistics.mean(losses[rate][s] for s in common))


def pending(
    records: Sequence[dict[str, Any]],
    methods: Sequence[str],
    rates: Sequence[str],
    seeds: int,
    tuning_seeds: int,
) -> list[Run]:
    """The runs to make now.

    Those at the best rate are known once the grid is complete; until then, they are not among them.

    Args:
        records: of the runs that were made.
        methods: names.
        rates: numbers, and perhaps `SUGGESTED`.
        seeds: of the runs that are compared.
        tuning_seeds: the first of them, on which every rate is tried.
    """
    done = known(records)
    grid = [
        (method, rate, seed)
        for seed in range(tuning_seeds)
        for rate in rates
        if rate != SUGGESTED
        for method in methods
    ]
    suggested = [
        (method, SUGGESTED, seed)
        for seed in range(seeds)
        for method in methods
        if SUGGESTED in rates
    ]
    missing = [run for run in grid if run not in done]
    tuned: list[Run] = []
    if not missing:
        best = {method: best_rate(records, method) for method in methods}
        tuned = [(m, r, seed) for seed in range(seeds) for m, r in best.items() if r is not None]
    return missing + [run for run in suggested + tuned if run not in done]
