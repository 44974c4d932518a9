"""Intervals and tests over seeds and tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000

FEWEST_SEEDS = 4
"""With fewer, a bootstrap interval says little more than the smallest and the largest: none is given."""


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean."""
    data = np.asarray(values, dtype=float)
    if len(data) < FEWEST_SEEDS:
        return (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = data[generator.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def stratified(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean over groups (tasks), resampled within each."""
    groups = [np.asarray(g, dtype=float) for g in groups if len(g)]
    if not groups or min(map(len, groups)) < FEWEST_SEEDS:
        return (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for data in groups:
        means += data[generator.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means / len(groups), (0.025, 0.975))
    return float(low), float(high)


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test of the mean: signs flipped at random.

    Exact up to sixteen pairs. Five pairs cannot go below 1/16: pool tasks for a finer answer.
    """
    data = np.asarray(differences, dtype=float)
    if not len(data) or not np.any(data):
        return 1.0
    count = len(data)
    if count <= 16:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        signs = 1.0 - 2.0 * bits
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (20_000, count))
    means = np.abs((signs * data).mean(1))
    return float((means >= abs(data.mean()) * (1 - 1e-12)).mean())


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan
