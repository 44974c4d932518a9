"""The loss before and after a start, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StartLoss:
    """The loss before and after a start, measured.

    Attributes:
        base: of the base model.
        start: with the adapter.
        on: on what, in words.
        error: the standard error of the difference; None where it was not estimated.
    """

    base: float
    start: float
    on: str
    error: float | None = None

    @property
    def change(self) -> float:
        """Negative where the start lowers the loss."""
        return self.start - self.base

    @property
    def gone(self) -> float | None:
        """The share of the base model's loss that is gone; None of a loss that is not positive."""
        return -self.change / self.base if self.base > 0 else None

    @property
    def moved(self) -> bool:
        """Whether the two differ by more than rounding."""
        return abs(self.change) >= 1e-4 * abs(self.base)


def measured_loss(measured: Mapping[str, Any]) -> StartLoss | None:
    """What was measured when the adapter was started, as its side file holds it."""
    try:
        base, start = float(measured["base_loss"]), float(measured["start_loss"])
        error = measured.get("gain_error")
        error = None if error is None else float(error)
    except (KeyError, TypeError, ValueError):
        return None
    return StartLoss(base, start, "the sequences held back when it was started", error)
