"""What is read off a loss curve, and off scores over learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float:
    """First step at which the curve is at or below the target, between points on a line.

    Infinite where it never is.
    """
    previous: tuple[float, float] | None = None
    for step, loss in zip(steps, losses, strict=True):
        if math.isnan(loss):
            continue
        if loss <= target:
            if previous is None or previous[1] <= loss:
                return float(step)
            share = (previous[1] - target) / (previous[1] - loss)
            return previous[0] + share * (step - previous[0])
        previous = (step, loss)
    return math.inf


def area(steps: Sequence[float], losses: Sequence[float], until: float | None = None) -> float:
    """Mean of the curve over its steps, by trapezoids, up to the step `until`."""
    x, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    end = x[-1] if until is None else until
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def good_range(rates: Sequence[float], scores: Sequence[float], tolerance: float = 0.02) -> float:
    """Decades of learning rate around the best whose score is within 2% of it.

    Between grid points the score is a line over the logarithm of the rate; a range ends
    at the grid's ends.
    """
    order = np.argsort(rates)
    x, y = np.log10(np.asarray(rates)[order]), np.nan_to_num(np.asarray(scores)[order])
    if y.max() <= 0:
        return 0.0
    fine = np.linspace(x[0], x[-1], 1001)
    good = np.interp(fine, x, y) >= (1 - tolerance) * y.max()
    top = int(np.argmax(np.interp(fine, x, y)))
    low = high = top
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(fine) - 1 and good[high + 1]:
        high += 1
    return float(fine[high] - fine[low])
