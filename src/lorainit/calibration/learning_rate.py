"""A learning rate with the start: from the rate at which one optimizer step lowers the loss most.

The rate of one step of signs is found by forward passes alone, with the model at its base. The best peak rate
of a run grows with it, but less than in proportion: large factors and high ranks, whose single steps are dear,
can still be trained at several times the rate of one step, and small ones hardly above it. The suggestion is a
power law whose two constants were fitted on recorded runs and judged on tasks beside them
(docs/learning_rate.md). Another rule from the same quantities, the largest eigenvalue of the curvature, is that
of "Learning Rate Matters" (arXiv 2602.04998); a range test over growing rates is Smith's (arXiv 1506.01186).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lorainit.errors import DataError

_AT = 5e-4
"""A rate of one step, about the middle of those that were fitted."""

_SUGGESTED = 1.2e-3
"""The rate suggested there: between what two models want (docs/learning_rate.md)."""

_POWER = 0.6
"""How much of a factor in the rate of one step is found in the best rate of a run."""

_RANGE = 1.8
"""The range reaches so many times below and above the suggestion."""

_FIRST, _GROWTH = 2e-5, 2.5
_LOWEST, _HIGHEST = -4, 9
"""Rates of one step that are tried: `_FIRST` times a power of `_GROWTH`, between these exponents."""


@dataclass(frozen=True)
class LearningRate:
    """A peak learning rate for AdamW with a short warmup and a decay to zero.

    Attributes:
        value: the suggestion.
        low: the lower end of a range worth trying, see docs/learning_rate.md for what its ends cost.
        high: its upper end.
        one_step: the rate at which one step of signs lowers the held-out loss most, short rows of `A`
            lengthened (`lorainit.calibration.sign_step.with_long_rows`).
        base_loss: on the held-back sequences, without the adapter.
        sequences: how many it was measured on, over all processes.
        trials: every ``(rate, loss)`` measured, ascending.
    """

    value: float
    low: float
    high: float
    one_step: float
    base_loss: float
    sequences: int
    trials: tuple[tuple[float, float], ...]

    def measured(self) -> dict[str, Any]:
        """As the adapter's record holds it."""
        return {
            "learning_rate": self.value,
            "learning_rate_low": self.low,
            "learning_rate_high": self.high,
            "one_step_rate": self.one_step,
            "learning_rate_trials": [list(trial) for trial in self.trials],
        }

    def for_factors_times(self, k: float) -> LearningRate:
        """The same for factors that are `k` times as large, at the scaling that leaves their product."""
        return replace(
            self, value=self.value * k, low=self.low * k, high=self.high * k, one_step=self.one_step * k,
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
    one_step, trials = first_minimum(after, start)
    if one_step is None:
        raise DataError(
            f"no learning rate can be suggested: no step lowers the loss of the {sequences} held-back "
            f"sequences, {start:.4g}. Give more data, or such as the model has not learned yet."
        )
    value = suggested(one_step)
    return LearningRate(
        value,
        value / _RANGE,
        value * _RANGE,
        one_step,
        start,
        sequences,
        tuple(sorted(trials.items())),
    )


def suggested(one_step: float) -> float:
    """The rate for a run, from the best rate of one step of signs."""
    return _SUGGESTED * math.pow(one_step / _AT, _POWER)


def first_minimum(
    loss_at: Callable[[float], float], start: float
) -> tuple[float | None, dict[float, float]]:
    """The lowest rate at which the loss has a minimum below the start's, and what was measured.

    A step of signs often has a second one, ten times as far, that no second step could follow. Rates are
    tried a factor of `_GROWTH` apart, at most fourteen; a parabola in the logarithm of the rate through the
    best and its neighbours gives the minimum.

    Args:
        loss_at: the loss after one step at a rate; not finite counts as infinitely bad.
        start: the loss before it.

    Returns:
        The rate, or None where no rate lowers the loss; losses by rate.
    """
    losses: dict[int, float] = {}

    def measure(k: int) -> float:
        if k not in losses:
            value = loss_at(_FIRST * _GROWTH**k)
            losses[k] = value if math.isfinite(value) else math.inf
        return losses[k]

    best = 0
    while not measure(best) < start and best > _LOWEST:
        best -= 1
    while best < _HIGHEST and measure(best + 1) < losses[best]:
        best += 1
    while best <= 0 and best > _LOWEST and measure(best - 1) < losses[best]:
        best -= 1
    trials = {_FIRST * _GROWTH**k: loss for k, loss in losses.items()}
    if not losses[best] < start:
        return None, trials
    # Below the least rate that was tried the step is short, and the loss nearly the start's; where the rate
    # above diverges there is no parabola, and the minimum lies nearer to the rate below.
    left, middle, right = losses.get(best - 1, start), losses[best], losses.get(best + 1, math.inf)
    shift = 0.0
    if math.isfinite(left) and math.isfinite(right) and left + right > 2 * middle:
        shift = 0.5 * (left - right) / (left + right - 2 * middle)
    elif not math.isfinite(right):
        shift = -0.25
    return _FIRST * _GROWTH ** (best + shift), trials
