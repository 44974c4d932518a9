"""Sequences whose loss is not finite: found, named, and taken out of their batch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lorainit.errors import NonFiniteError
from lorainit.statistics.batches import (
    batch_rows,
    is_splittable,
    row_sequences,
    rows_where,
    split_rows,
)
from lorainit.statistics.packing import packed_segments

logger = logging.getLogger("lorainit")


@dataclass(frozen=True, eq=False)
class Numbered:
    """A batch, or what is left of one.

    Attributes:
        batch: the model's arguments.
        index: of the batch in the data; -1 for one that only keeps other processes company.
        rows: which of that batch's rows these are.
        counts: whether it counts.
    """

    batch: Mapping[str, Any]
    index: int
    rows: tuple[int, ...]
    counts: bool = True

    @property
    def sequences(self) -> int:
        """How many sequences count."""
        return sum(row_sequences(self.batch, batch_rows(self.batch))) if self.counts else 0


def looks_at_once(device: torch.device) -> bool:
    """Whether a loss may be looked at before its backward, since nothing is waited for."""
    return device.type != "cuda"


class Glances:
    """Whether losses were finite, asked of a device without waiting for it."""

    def __init__(self) -> None:
        self._open: deque[tuple[Numbered, Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, part: Numbered, losses: Tensor) -> None:
        """Ask about ``(sequences,)`` losses of a batch."""
        finite = torch.isfinite(losses.detach())
        every = finite.all()
        event = None
        if every.is_cuda:
            with torch.cuda.device(every.device):
                answer = torch.empty((), dtype=torch.bool, pin_memory=True)
                answer.copy_(every, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            every = answer
        self._open.append((part, finite, every, event))

    def bad(self, *, wait: bool = False) -> tuple[Numbered, Tensor] | None:
        """The first batch known to be bad and its ``(sequences,)`` finite ones; `wait` for all."""
        while self._open:
            part, finite, every, event = self._open[0]
            if wait and event is not None:
                event.synchronize()
            elif not wait and (event is None or not event.query()):  # type: ignore[no-untyped-call]
                return None
            self._open.popleft()
            if not bool(every):
                return part, finite
        return None


def numbered(index: int, batch: Mapping[str, Any], *, counts: bool = True) -> Numbered:
    """A whole batch."""
    return Numbered(batch, index, tuple(range(batch_rows(batch))), counts)


def cut(part: Numbered, rows: int | None) -> list[Numbered]:
    """The same rows in batches of at most `rows`, where the batch can be split; None: as it is."""
    if rows is None:
        return [part]
    pieces: list[Numbered] = []
    first = 0
    for batch in split_rows([dict(part.batch)], rows):
        count = batch_rows(batch)
        pieces.append(replace(part, batch=batch, rows=part.rows[first : first + count]))
        first += count
    return pieces


def without_bad(
    part: Numbered, finite: Tensor, policy: Literal["raise", "skip"]
) -> tuple[Numbered | None, int]:
    """What is left of a batch, and how many sequences are not.

    Args:
        part: a batch whose loss is not finite.
        finite: ``(sequences,)`` or ``(rows,)`` booleans.
        policy: ``"raise"``, or ``"skip"`` with a line in the log.

    Returns:
        The rest, None where nothing is left, and the number of sequences taken out.

    Raises:
        NonFiniteError: under ``"raise"``; it names batch and rows.
    """
    bad = _bad_rows(part, finite)
    named = [part.rows[row] for row in bad]
    if policy == "raise":
        raise NonFiniteError(
            f"the loss of batch {part.index} is not finite (sequences {named} in it). Look at that "
            "batch, load the model in bfloat16 or float32 instead of float16, or pass "
            "on_nonfinite='skip'."
        )
    rows = len(part.rows)
    if len(bad) < rows and not is_splittable(part.batch):
        logger.warning(
            "batch %d skipped: the loss of its sequences %s is not finite, and it holds tensors "
            "that are not one entry a sequence, so the others cannot be told apart",
            part.index,
            named,
        )
        return None, part.sequences
    logger.warning(
        "batch %d: its sequences %s skipped, their loss is not finite", part.index, named
    )
    if len(bad) == rows:
        return None, part.sequences
    keep = torch.ones(rows, dtype=torch.bool)
    keep[bad] = False
    left = Numbered(
        rows_where(part.batch, keep, rows),
        part.index,
        tuple(row for row, kept in zip(part.rows, keep.tolist(), strict=True) if kept),
    )
    return left, part.sequences - left.sequences


def _bad_rows(part: Numbered, finite: Tensor) -> list[int]:
    """Rows with a sequence that is not finite; all, where only their sum is not."""
    rows = len(part.rows)
    bad = (~finite).nonzero().flatten().cpu()
    if len(bad) == 0:
        return list(range(rows))
    if finite.shape[0] == rows:
        return [int(row) for row in bad]
    labels = part.batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return list(range(rows))
    segments, _ = packed_segments(part.batch, labels)
    return torch.isin(segments.cpu(), bad).any(1).nonzero().flatten().tolist()
