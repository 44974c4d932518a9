"""Differences of losses, sequence by sequence: what is gained, and how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorainit.parallel import collectives


@dataclass(frozen=True, eq=False)
class SequenceLosses:
    """Losses of this process's part of a sample.

    Attributes:
        losses: ``(entries,)``, one a sequence, or one for what a loss function takes together; zero for a
            sequence without labels.
        sequences: entries that have a label.
        unit: what the sum over all processes is divided by: sequences, or label tokens.
    """

    losses: Tensor
    sequences: float
    unit: float


@dataclass(frozen=True)
class Gain:
    """By how much one mean loss lies below another over the same sequences.

    Attributes:
        mean: the difference of the means.
        error: its standard error over sequences; infinite where there are fewer than two.
        sequences: how many they are, over all processes.
    """

    mean: float
    error: float
    sequences: int

    @property
    def clear(self) -> bool:
        """Whether it is above zero by a one-sided t-test at 2.5%.

        That is two standard errors where sequences are many, and more where they are few: 4.3 of three,
        12.7 of two, whose own scatter says little of the error. Of one nothing is clear.
        """
        return self.mean > 0 and self.mean > self.error * t_quantile(self.sequences - 1)


def clearest(
    before: SequenceLosses, trials: Sequence[SequenceLosses], best: int
) -> tuple[int | None, Gain]:
    """Which of several trials to take: the best, if its gain is clear, else the best of those that are.

    Few sequences may all gain by chance. A shorter step moves their losses less, and apart from each
    other less still, so it may be clear where the best is not.

    Args:
        before: losses before any of them.
        trials: losses of each.
        best: the one of least mean loss.

    Returns:
        Its place, None where no trial's gain is clear; and the gain: that trial's, or the best one's.
    """
    found = gain(before, trials[best])
    if found.clear:
        return best, found
    clear = [(each.mean, i, each) for i, t in enumerate(trials) if (each := gain(before, t)).clear]
    if not clear:
        return None, found
    _, place, shorter = max(clear, key=lambda entry: entry[:2])
    return place, shorter


def gain(before: SequenceLosses, after: SequenceLosses) -> Gain:
    r"""The paired difference of two measurements of the same sequences; all processes call it.

    With ``d_i`` the difference of sequence ``i``, of ``n``, and ``u`` the unit, the mean is
    ``sum_i d_i / u`` and its standard error ``sqrt(n var(d)) / u``.
    """
    d = before.losses.double() - after.losses.double()
    n, unit, total, squares = collectives.sum_counts(
        [before.sequences, before.unit, float(d.sum()), float(d.square().sum())]
    )
    if n < 2 or not math.isfinite(total):
        return Gain(total / max(unit, 1.0), math.inf, round(n))
    variance = max(0.0, squares - total**2 / n) / (n - 1)
    return Gain(total / unit, math.sqrt(n * variance) / unit, round(n))


_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t that is exceeded in 2.5 of 100 cases, at 1 to 10 degrees of freedom."""


def t_quantile(degrees: int) -> float:
    """Student's t that is exceeded in 2.5 of 100 cases.

    From a table, and beyond it by the expansion in 1/degrees (Abramowitz, Stegun, 26.7.5), to 5e-4.
    """
    if degrees < 1:
        return math.inf
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
