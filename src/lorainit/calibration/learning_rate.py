"""A learning rate with the start: from the rate whose first two steps lower the loss most.

Two steps of Adam are taken from where training begins, at the shares of a peak rate that a short warmup gives
them. One step alone is the gradient's signs: it sees neither that it turns the gradient itself, nor that it
makes short rows of `A` long; the second does. The best peak rate of a run grows with that of two steps, but
less than in proportion. The two constants of the power law were fitted on recorded runs of one model and judged
on another (docs/learning_rate.md). Another rule, from the largest eigenvalue of the curvature, is that of
"Learning Rate Matters" (arXiv 2602.04998); a range test that trains through growing rates is Smith's (arXiv
1506.01186).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lorainit.errors import DataError

_AT = 5e-4
"""A best rate of two steps, about the middle of those that were fitted."""

_SUGGESTED = 7e-4
"""The rate suggested there."""

_POWER = 0.65
"""How much of a factor in the rate of two steps is found in the best rate of a run."""

_RANGE = 1.8
"""The range reaches so many times below and above the suggestion."""

_FIRST, _GROWTH, _TRIED = 8e-5, 4.0, 4
"""So many peak rates are tried, a factor of `_GROWTH` apart, and more where an outermost is best."""

_LOWEST, _HIGHEST = -4, 6
"""No others than `_FIRST` times a power of `_GROWTH` between these exponents are tried."""


@dataclass(frozen=True)
class LearningRate:
    """A peak learning rate for AdamW with a short warmup and a decay to zero.

    Attributes:
        value: the suggestion.
        low: the lower end of a range worth trying, see docs/learning_rate.md for what its ends cost.
        high: its upper end.
        two_steps: the peak rate whose first two steps of a warmup lower the held-out loss most
            (`lorainit.calibration.adam_steps`).
        start_loss: on the held-back sequences, before the first step (a start of measured length: the base's).
        sequences: how many it was measured on, over all processes.
        trials: every ``(peak rate, loss after two steps)`` measured, ascending.
    """

    value: float
    low: float
    high: float
    two_steps: float
    start_loss: float
    sequences: int
    trials: tuple[tuple[float, float], ...]

    def measured(self) -> dict[str, Any]:
        """As the adapter's record holds it."""
        return {
            "learning_rate": self.value,
            "learning_rate_low": self.low,
            "learning_rate_high": self.high,
            "two_steps_rate": self.two_steps,
            "learning_rate_trials": [list(trial) for trial in self.trials],
        }

    def for_factors_times(self, k: float) -> LearningRate:
        """The same for factors that are `k` times as large, at the scaling that leaves their product."""
        return replace(
            self, value=self.value * k, low=self.low * k, high=self.high * k, two_steps=self.two_steps * k,
            trials=tuple((rate * k, loss) for rate, loss in self.trials),
        )  # fmt: skip

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return (
            f"learning rate {self.value:.2g} (range {self.low:.1g} to {self.high:.1g}), for AdamW with "
            f"warmup and decay; measured on {self.sequences} sequences"
        )


def find_learning_rate(
    start: float, after: Callable[[float], float], sequences: int
) -> LearningRate:
    """The suggestion from the losses after two steps.

    Args:
        start: the loss before them.
        after: the loss after two steps of a warmup to a peak rate.
        sequences: that they are measured on, over all processes.

    Raises:
        DataError: no rate lowers the loss: there is nothing to tell a good rate by.
    """
    best, trials = best_rate(after, start)
    if best is None:
        raise DataError(
            f"no learning rate can be suggested: no rate lowers the loss of the {sequences} held-back "
            f"sequences, {start:.4g}. Give more data, or such as the model has not learned yet."
        )
    value = suggested(best)
    return LearningRate(
        value,
        value / _RANGE,
        value * _RANGE,
        best,
        start,
        sequences,
        tuple(sorted(trials.items())),
    )


def suggested(two_steps: float) -> float:
    """The rate for a run, from the best rate of two steps."""
    return _SUGGESTED * math.pow(two_steps / _AT, _POWER)


def best_rate(
    loss_at: Callable[[float], float], start: float
) -> tuple[float | None, dict[float, float]]:
    """The rate of least loss, between those that are tried, and what was measured.

    A parabola in the logarithm of the rate through the lowest and its neighbours gives the minimum.

    Args:
        loss_at: the loss at a rate; not finite counts as infinitely bad.
        start: the loss at none.

    Returns:
        The rate, or None where no rate lowers the loss; losses by rate.
    """
    losses: dict[int, float] = {}

    def measure(k: int) -> None:
        value = loss_at(_FIRST * _GROWTH**k)
        losses[k] = value if math.isfinite(value) else math.inf

    def best() -> int:
        return min(losses, key=losses.__getitem__)

    for k in range(_TRIED):
        measure(k)
    while best() == max(losses) < _HIGHEST and losses[best()] < start:
        measure(max(losses) + 1)
    while min(losses) > _LOWEST and (best() == min(losses) or not losses[best()] < start):
        measure(min(losses) - 1)
    trials = {_FIRST * _GROWTH**k: loss for k, loss in sorted(losses.items())}
    at = best()
    if not losses[at] < start:
        return None, trials
    # Below the least rate that was tried the steps are short, and the loss nearly the start's; where the rate
    # above diverges there is no parabola, and the minimum lies nearer to the rate below.
    left, middle, right = losses.get(at - 1, start), losses[at], losses.get(at + 1, math.inf)
    shift = 0.0
    if math.isfinite(left) and math.isfinite(right) and left + right > 2 * middle:
        shift = 0.5 * (left - right) / (left + right - 2 * middle)
    elif not math.isfinite(right):
        shift = -0.25
    return _FIRST * _GROWTH ** (at + shift), trials
