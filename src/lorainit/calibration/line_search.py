"""The length of a step, measured: a search along a line by forward passes alone.

Where a method gives a direction, its length is one number for the whole model. The search brackets a
minimum by growing or shrinking, then closes in by parabolas through the three best points, in the
logarithm of the length. Along a natural step the loss often has more than one minimum, so the search
scans a few lengths on both sides before it walks; not the shorter ones, where the loss falls nearly in
proportion to the length there. It never returns a length whose loss is above the loss at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lorainit.calibration.paired import Gain, SequenceLosses, clearest

LossAt = Callable[[float], float]
"""The loss at a length; may be not finite, which counts as infinitely bad."""

_GROWTH = 4.0

_IN_PROPORTION = 3.0
"""A length `_GROWTH` times as long that gains so many times as much: shorter ones gain less still."""

_SHRINKS = 5
"""How often the shortest length of a scan is divided by `_GROWTH`, where all of it leads up."""


@dataclass(frozen=True)
class SearchResult:
    """What a search along a line found.

    Attributes:
        length: of the least loss that was measured; zero if none was below the start's.
        loss: at that length.
        start_loss: at length zero.
        trials: every ``(length, loss)`` measured, in order.
        gain_by_sequence: what was taken lowers the loss by, with its standard error; None where that was
            not asked, or nothing lowers it.
        unclear: the largest gain there was, where it is not clear and so nothing was taken.
    """

    length: float
    loss: float
    start_loss: float
    trials: tuple[tuple[float, float], ...]
    gain_by_sequence: Gain | None = None
    unclear: Gain | None = None

    @property
    def is_share(self) -> bool:
        """Whether the gain is a share of the loss: of one that may be negative there is none."""
        losses = [self.loss, *(loss for _, loss in self.trials)]
        return self.start_loss > 0 and min(losses) >= 0

    @property
    def gain(self) -> float:
        """Share of the start's loss that is gone, or by how much a loss that may be negative is lower."""
        difference = self.start_loss - self.loss
        return difference / self.start_loss if self.is_share else difference

    def on(self, gain: Gain) -> SearchResult:
        """The result with its gain measured on more sequences; at the start, if it is not clear there."""
        if not gain.clear:
            return replace(
                self, length=0.0, loss=self.start_loss, gain_by_sequence=None, unclear=gain
            )
        return replace(self, loss=self.start_loss - gain.mean, gain_by_sequence=gain)

    @property
    def unmoved(self) -> bool:
        """Whether the loss is the same at every length: it compares with a reference that moves along."""
        # To the bit: what is flat and not constant moves by its rounding at least.
        return bool(self.trials) and all(loss == self.start_loss for _, loss in self.trials)


def clear_result(
    result: SearchResult, before: SequenceLosses, measured: Sequence[SequenceLosses]
) -> tuple[SearchResult, int | None]:
    """The result, at a trial whose gain is clear: its own, another one, or none.

    Args:
        result: of a search.
        before: losses at its start, sequence by sequence.
        measured: the same of its trials, in their order.

    Returns:
        The result, and the place of its trial; None for the start.
    """
    if result.length == 0:
        return result, None
    best = result.trials.index((result.length, result.loss))
    place, found = clearest(before, measured, best)
    if place is None:
        return replace(result, length=0.0, loss=result.start_loss, unclear=found), None
    length, loss = result.trials[place]
    return replace(result, length=length, loss=loss, gain_by_sequence=found), place


def search_length(
    loss_at: LossAt,
    first: float,
    *,
    precision: float = 0.1,
    max_trials: int = 24,
    start_loss: float | None = None,
    scan: int = 2,
) -> SearchResult:
    """Search for the length with the least loss.

    Args:
        loss_at: the loss at a length.
        first: where to begin, of the right order if possible; positive.
        precision: close in until the bracket is this wide, relative to the length.
        max_trials: at most so many evaluations.
        start_loss: the loss at zero, where it is known already.
        scan: how many factors of 4 to look at on both sides of `first` before walking; on the longer side
            alone, where one such factor gains three times as much or more.

    Returns:
        The best length measured, with all trials.

    Raises:
        ValueError: `first` is not positive and finite, or the loss at zero is not finite.
    """
    if not (math.isfinite(first) and first > 0):
        raise ValueError(f"the first length to try must be positive and finite, got {first!r}")
    start = loss_at(0.0) if start_loss is None else start_loss
    if not math.isfinite(start):
        raise ValueError(f"the loss before any step is {start}: look at the data and the model")
    trials: dict[float, float] = {}

    def measure(length: float) -> float:
        if length not in trials:
            value = loss_at(length)
            trials[length] = value if math.isfinite(value) else math.inf
        return trials[length]

    middle = _best_on_grid(measure, first, start, max_trials, trials, scan)
    low, high = middle / _GROWTH, middle * _GROWTH
    while len(trials) < max_trials and high / low > 1 + precision and trials[middle] < start:
        trial = _next_trial(low, middle, high, trials)
        if measure(trial) < trials[middle]:
            low, middle, high = (low, trial, middle) if trial < middle else (middle, trial, high)
        else:
            low, high = (trial, high) if trial < middle else (low, trial)
    length, loss = min(trials.items(), key=lambda item: item[1])
    if loss >= start:
        length, loss = 0.0, start
    return SearchResult(length, loss, start, tuple(trials.items()))


def _best_on_grid(
    measure: LossAt,
    first: float,
    start: float,
    max_trials: int,
    trials: dict[float, float],
    scan: int,
) -> float:
    """Walk in factors of `_GROWTH` to a length whose neighbours on both sides are worse."""
    for way in (range(scan + 1), range(-scan, 0)):
        for exponent in way:
            if len(trials) < max_trials:
                measure(first * _GROWTH**exponent)
        gains = [start - trials.get(length, math.inf) for length in (first, first * _GROWTH)]
        if gains[1] >= _IN_PROPORTION * gains[0] > 0:
            break
    middle = min(trials, key=lambda length: trials[length])
    if trials[middle] < start:
        while len(trials) < max_trials and measure(middle * _GROWTH) < trials[middle]:
            middle *= _GROWTH
    else:
        # Too long, or no way down at all: shrink until the loss falls below the start's, or by so much
        # that what a still shorter step brings is not worth having.
        middle = min(trials)
        for _ in range(_SHRINKS):
            if len(trials) >= max_trials or trials[middle] < start:
                break
            middle /= _GROWTH
            measure(middle)
        if trials[middle] >= start:
            return middle
    while len(trials) < max_trials and measure(middle / _GROWTH) < trials[middle]:
        middle /= _GROWTH
    return middle


def _next_trial(low: float, middle: float, high: float, trials: dict[float, float]) -> float:
    """The vertex of the parabola through the bracket, or the middle of its longer half."""
    a, b, c = math.log(low), math.log(middle), math.log(high)
    fa, fb, fc = (trials.get(x, math.inf) for x in (low, middle, high))
    longer = (a + b) / 2 if b - a > c - b else (b + c) / 2
    candidate = longer
    if math.isfinite(fa) and math.isfinite(fc):
        numerator = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
        denominator = (b - a) * (fb - fc) - (b - c) * (fb - fa)
        if denominator != 0:
            vertex = b - numerator / (2 * denominator)
            margin = 0.05 * (c - a)
            if a + margin < vertex < c - margin and abs(vertex - b) > margin / 2:
                candidate = vertex
    return math.exp(candidate)
