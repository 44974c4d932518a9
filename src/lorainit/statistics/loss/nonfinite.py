"""Sequences whose loss is not finite: found, named, and taken out of their batch."""

from __future__ import annotations

import logging
from collections import deque
from typing import Literal

import torch
from torch import Tensor

from lorainit.data.batch import Batch
from lorainit.errors import NonFiniteError

logger = logging.getLogger("lorainit")


def checks_at_once(device: torch.device) -> bool:
    """Whether a loss may be looked at before its backward, since nothing is waited for."""
    return device.type != "cuda"


class DeferredChecks:
    """Whether losses were finite, asked of a device without waiting for it."""

    def __init__(self) -> None:
        self._open: deque[tuple[Batch, Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, part: Batch, losses: Tensor) -> None:
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

    def bad(self, *, wait: bool = False) -> tuple[Batch, Tensor] | None:
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


def without_bad(
    batch: Batch, finite: Tensor, policy: Literal["raise", "skip"]
) -> tuple[list[Batch], int]:
    """What is left of a batch, and how many sequences are not.

    Args:
        batch: its loss is not finite.
        finite: ``(sequences,)`` or ``(rows,)`` booleans.
        policy: ``"raise"``, or ``"skip"`` with a line in the log.

    Raises:
        NonFiniteError: under ``"raise"``; it names batch and sequences.
    """
    bad = batch.bad_units(finite)
    named = [batch.unit_names[unit] for unit in bad]
    if not batch.separable:
        named = (~finite).nonzero().flatten().tolist()
    if policy == "raise":
        raise NonFiniteError(
            f"the loss of batch {batch.index} is not finite (sequences {named} in it). Look at that "
            "batch, load the model in bfloat16 or float32 instead of float16, or pass "
            "on_nonfinite='skip'."
        )
    if not batch.separable and len(named) < batch.sequences:
        logger.warning(
            "batch %d skipped: the loss of its sequences %s is not finite, and it holds tensors "
            "that are not one entry a sequence, so the others cannot be told apart",
            batch.index,
            named,
        )
        return [], batch.sequences
    logger.warning(
        "batch %d: its sequences %s skipped, their loss is not finite", batch.index, named
    )
    left = batch.take([unit not in bad for unit in range(batch.units)])
    return left, batch.sequences - sum(part.sequences for part in left)
