"""Positions that were noted in one forward pass, for layers that run again outside of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lorainit.statistics.positions.calls import InputPositions


class NotedPositions:
    """Stands for `ModelCalls` while layers run again: each call counts what it counted the first time."""

    def __init__(self, notes: Mapping[str, Sequence[InputPositions]]) -> None:
        self._left = {name: list(found) for name, found in notes.items()}

    def begin_batch(self, batch: Mapping[str, Any], moved: Mapping[str, Any]) -> None:
        """Nothing is read from the batch again."""

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """No hooks on the model's parts, which do not run."""
        yield

    def rows(self) -> int | None:
        """Not known: what the first forward could not tell apart is left out already."""
        return None

    def of_input(self, name: str, x: Tensor) -> InputPositions:
        """Which positions of what layer `name` reads now count."""
        found = self._left.get(name)
        if not found:
            return InputPositions(None, known=False)
        # The last one stays: a checkpoint inside of a block runs its layers once more.
        return found.pop(0) if len(found) > 1 else found[0]

    def note_discarded(self, name: str, x: Tensor) -> None:
        """Already noted."""
