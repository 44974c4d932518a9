"""Student's and Welch's t, means with their intervals, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% t interval of the mean."""
    if len(values) < 2:
        return (math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return statistics.mean(values) - reach, statistics.mean(values) + reach


def task_level_p(values: Sequence[float]) -> float:
    """Of a t test that the mean over tasks is zero."""
    return float(stats.ttest_1samp(values, 0.0).pvalue) if len(values) > 1 else math.nan


def welch_error(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Standard error of the difference of two means, and Welch's degrees of freedom."""
    if min(len(mine), len(theirs)) < 2:
        return math.nan, math.nan
    parts = [(statistics.variance(v) / len(v), len(v) - 1) for v in (mine, theirs)]
    return _together(parts)


def with_error(
    error: float, freedom: float, other: float, other_freedom: float
) -> tuple[float, float]:
    """Two independent errors of one figure together, with Satterthwaite's degrees of freedom."""
    return _together([(error**2, freedom), (other**2, other_freedom)])


def _together(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    whole = sum(variance for variance, _ in parts)
    if not whole > 0:
        return (0.0 if whole == 0 else math.nan), sum(freedom for _, freedom in parts)
    return math.sqrt(whole), whole**2 / sum(v**2 / freedom for v, freedom in parts)


def around(value: float, error: float, freedom: float) -> tuple[float, float]:
    """95% t interval around a value with a standard error."""
    reach = float(stats.t.ppf(0.975, freedom)) * error
    return value - reach, value + reach


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values corrected by Holm's step-down method."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    found, largest = {}, 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        found[name] = largest
    return found


@dataclass(frozen=True)
class Mean:
    """A mean over tasks with its 95% t interval, and on how many of them it is below zero."""

    value: float
    low: float
    high: float
    below: int
    tasks: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        low, high = interval(values)
        below = sum(value < 0 for value in values)
        return cls(statistics.mean(values), low, high, below, len(values))

    def rounded(self, digits: int) -> str:
        """With its interval, where there are two tasks."""
        text = f"{self.value:+.{digits}f}"
        if math.isnan(self.low):
            return text
        return f"{text} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"

    def __str__(self) -> str:
        return self.rounded(3)
