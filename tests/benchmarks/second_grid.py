"""The comparison of the stage "grid" a second time, in numpy, written apart from the first."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.quality.experiment import GRID
from scipy.special import stdtrit

from tests.benchmarks.made_up_grid import LABELS, SIX, STEPS, TASKS, Record

SEEDS = 5


def cube(records: list[Record], *path: Any) -> np.ndarray:
    """One figure of every run, ``(task, label, rate, seed)``; NaN where nothing has run."""
    found = np.full((len(TASKS), len(LABELS), len(GRID), SEEDS), np.nan)
    for r in records:
        value: Any = r
        for key in path:
            value = value[key]
        found[
            TASKS.index(r["task"]),
            LABELS.index(r["label"]),
            GRID.index(r["learning_rate"]),
            r["seed"],
        ] = value
    return found  # fmt: skip


def choices(
    records: list[Record], label: str, least: tuple[float, ...] = SIX
) -> list[tuple[np.ndarray, int, int, np.ndarray]]:
    """By task: seeds, best rates of the line and of plain LoRA as places in the grid, rates compared."""
    validation = cube(records, "validation", "loss")
    needed = np.isin(GRID, least)
    found = []
    for t in range(len(TASKS)):
        both = validation[t, [LABELS.index(label), 0]]
        ran = ~np.isnan(both)
        # A seed of a line counts with all of `least`; a shared one counts in both lines.
        seeds = np.flatnonzero(ran[:, needed].all((0, 1)))
        rates = np.flatnonzero(ran[:, :, seeds].all((0, 2)))
        mean = both[:, rates][:, :, seeds].mean(-1)
        mine, base = rates[mean.argmin(-1)]
        found.append((seeds, int(mine), int(base), rates))
    return found


def gaps(
    records: list[Record], label: str, *path: Any, least: tuple[float, ...] = SIX
) -> list[tuple[np.ndarray, np.ndarray]]:
    """By task: a figure of the line and of plain LoRA at their best rates, over the shared seeds."""
    values, line = cube(records, *path), LABELS.index(label)
    return [
        (values[t, line, mine, seeds], values[t, 0, base, seeds])
        for t, (seeds, mine, base, _) in enumerate(choices(records, label, least))
    ]


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of the 95% t interval."""
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def welch_half(a: np.ndarray, b: np.ndarray, items: float = 0.0, count: int = 2) -> float:
    """Half width of Welch's 95% interval; with a variance over items of `count` items added."""
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    seeds, freedom = parts.sum(), parts.sum() ** 2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum()
    if items:
        whole = seeds + items
        freedom = whole**2 / (seeds**2 / freedom + items**2 / (count - 1))
        seeds = whole
    return float(stdtrit(freedom, 0.975) * np.sqrt(seeds))


def first_below(curve: list[float], target: float) -> float:
    """First of very many points of a curve at or below the target, as a share of the steps."""
    steps = np.linspace(0, STEPS[-1], 160_001)
    below = np.interp(steps, STEPS, curve) <= target
    return float(steps[below.argmax()] / STEPS[-1]) if below.any() else float("inf")
