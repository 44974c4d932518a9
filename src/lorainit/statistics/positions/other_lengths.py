"""Inputs with more or fewer positions than their part of the model was given.

Models pad by themselves, make fewer steps of their input, and add or choose positions. The mask that they
give their blocks of layers tells which positions count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.statistics.positions.call_tensors import arguments_of, has_rows
from lorainit.statistics.positions.calls import Call, InputPositions, KnownMasks
from lorainit.statistics.positions.counted import CountedPositions, attended_keys, positions_of


def of_other_length(
    call: Call, x: Tensor, known: KnownMasks, device: torch.device
) -> InputPositions:
    """Which positions of an input count; those of the call where it has the call's length.

    Args:
        call: that is running.
        x: ``(rows, positions, in)``; anything else is the call's.
        known: masks of this batch.
        device: where indices go.
    """
    own = call.found.mask
    given = call.shape or (own.shape if own is not None else None)
    if given is None or not has_rows(x, given[0]):
        return call.found
    if x.shape[1] == given[1] or (
        call.shape is None and own is not None and own.lying_like(x.shape[:-1]) is not None
    ):
        return call.found
    streams = 1 + _predicted_at_once(call.module)
    if own is not None and streams > 2 and x.shape[1] == streams * given[1]:
        return InputPositions(own.beside(streams))
    blocks = [arguments_of(*block) for block in reversed(call.blocks)]
    for arguments in blocks:
        for name in ("attention_mask", "encoder_attention_mask"):
            found = _of_keys(arguments.get(name), x, known, device)
            if found is not None:
                return InputPositions(found)
    if blocks and _is_of_another_argument(x, blocks[0]):
        return InputPositions()
    if call.shape is None or x.shape[1] < given[1]:
        return call.found
    padded = own is not None and own.indices is not None
    return InputPositions(own, known=not (padded or _masks_anything(blocks, given[0])))


def _of_keys(
    mask: object, x: Tensor, known: KnownMasks, device: torch.device
) -> CountedPositions | None:
    """Positions of a block's mask, if it is one of as many."""
    if not isinstance(mask, Tensor):
        return None
    if (found := known.get(mask, x.shape[:2])) is not None:
        return found
    kept = attended_keys(mask, *x.shape[:2])
    return None if kept is None else known.keep(mask, x.shape[:2], positions_of(kept, device))


def _masks_anything(blocks: list[dict[str, Any]], rows: int) -> bool:
    """Whether the innermost mask of another length masks anything, so that padding can be here."""
    mask = next((m for b in blocks if isinstance(m := b.get("attention_mask"), Tensor)), None)
    if mask is None:
        return False
    kept = attended_keys(mask, rows, mask.shape[-1])
    return kept is None or not bool(kept.all())


def _predicted_at_once(module: nn.Module) -> int:
    """How many tokens ahead a decoder predicts, with a copy of its positions for each beside them."""
    found = getattr(getattr(module, "config", None), "ngram", None)
    return found if isinstance(found, int) else 0


def _is_of_another_argument(x: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether an input lies like states that a block was given beside its own, without a mask of their own.

    Not those of an encoder, whose padding the block may never have been told.
    """
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    masks = [key for key in tensors if key.endswith("mask")]
    states = {key: value.shape[:-1] for key, value in tensors.items() if key not in masks}
    first, *others = states
    own = [key for key in others if not key.startswith(("encoder", "key", "cross"))]
    lying = any(states[key] == x.shape[:-1] for key in own)
    return len(masks) < 2 and lying and states[first] != x.shape[:-1]
