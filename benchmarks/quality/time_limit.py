"""A call's time against its limit."""

from __future__ import annotations

import time


class OutOfTime(Exception):
    """The next piece of work would not end within the limit."""


class Clock:
    """Time since the start against a limit."""

    def __init__(self, limit: float | None) -> None:
        self.began, self.limit = time.perf_counter(), limit

    @property
    def gone(self) -> float:
        return time.perf_counter() - self.began

    def check(self, wanted: float) -> None:
        """Raise `OutOfTime` unless `wanted` more seconds are left."""
        if self.limit is not None and self.gone + wanted > self.limit:
            raise OutOfTime
