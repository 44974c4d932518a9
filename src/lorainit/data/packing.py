"""Packed rows: which sequence each position of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where sequences begin in one row, and its end: what attention kernels for rows of many lengths read."""

LONGEST = ("max_length_q", "max_length_k")
"""The longest sequence's length, beside them."""


def packed_segments(batch: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each position belongs to, and where sequences after a row's first start.

    One row is one sequence, unless the batch says that rows are packed: by ``position_ids`` that
    return to zero, by ``seq_idx``, or by ``cu_seq_lens_q`` (one row).

    Args:
        batch: keywords of the model's forward.
        like: ``(rows, length)``, token ids or labels.

    Returns:
        ``(rows, length)`` integers counting from zero through the batch, and a boolean
        ``(rows, length)``, both on the CPU.
    """
    rows, length = like.shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    position_ids = batch.get("position_ids")
    if isinstance(batch.get("seq_idx"), Tensor) and batch["seq_idx"].shape == like.shape:
        index = batch["seq_idx"].cpu()
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
    elif isinstance(batch.get("cu_seq_lens_q"), Tensor) and rows == 1:
        bounds = batch["cu_seq_lens_q"].cpu().long()
        starts[0, bounds[(bounds > 0) & (bounds < length)]] = True
    elif isinstance(position_ids, Tensor) and position_ids.shape == like.shape:
        starts = position_ids.cpu() == 0
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == like.shape:
            starts &= mask.cpu().bool()
        # The first start of a row is the row's own.
        starts &= starts.cumsum(dim=1) > 1
    within = starts.long().cumsum(dim=1)
    per_row = within[:, -1] + 1 if length else torch.ones(rows, dtype=torch.long)
    offsets = per_row.cumsum(0) - per_row
    return within + offsets.unsqueeze(1), starts


def positions_can_be_taken(batch: Mapping[str, Any], segments: Tensor) -> bool:
    """Whether some of a row's positions can be taken of everything that the batch holds."""
    rows, length = segments.shape
    return all(
        key in (*CUMULATIVE_LENGTHS, *LONGEST)
        or not isinstance(value, Tensor)
        or value.dim() < 2
        or _axes_of_positions(value, rows, length) is not None
        for key, value in batch.items()
    )


def row_of(batch: Mapping[str, Any], row: int, kept: Tensor, segments: Tensor) -> dict[str, Any]:
    """One packed row with some of its positions: whole sequences, joined again.

    Args:
        batch: keywords of the model's forward, rows packed.
        row: which one.
        kept: ``(length,)`` booleans.
        segments: ``(rows, length)``, the sequence of each position.

    Returns:
        A batch of one row of as many positions as are kept; lengths of sequences are counted anew.
    """
    rows, length = segments.shape
    found: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, list | tuple) and len(value) == rows:
            found[key] = value[row : row + 1]
        elif not isinstance(value, Tensor) or value.dim() == 0:
            found[key] = value
        elif value.dim() == 1:
            found[key] = value[row : row + 1] if value.shape[0] == rows else value
        else:
            axes = _axes_of_positions(value, rows, length)
            assert axes is not None
            index = kept.nonzero().flatten().to(value.device)
            # The rows lie before the first axis of positions, or in front.
            part = value.narrow(axes[0] - 1 if len(axes) == 1 else 0, row, 1)
            for axis in axes:
                part = part.index_select(axis, index)
            found[key] = part
    own = segments[row][kept]
    lengths: Tensor = own.unique(return_counts=True)[1]  # type: ignore[no-untyped-call]
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    for key in CUMULATIVE_LENGTHS:
        if isinstance(old := batch.get(key), Tensor):
            found[key] = bounds.to(old)
    for key in LONGEST:
        if (old := batch.get(key)) is not None:
            most = int(lengths.max())
            found[key] = torch.full_like(old, most) if isinstance(old, Tensor) else most
    return found


def _axes_of_positions(value: Tensor, rows: int, length: int) -> tuple[int, ...] | None:
    """Which dimensions of a tensor count positions; None: there is no telling."""
    shape = tuple(value.shape)
    if shape[:2] == (rows, length):
        return (1,)
    if len(shape) == 3 and shape[1:] == (rows, length):
        return (1 + 1,)
    if len(shape) == 4 and shape[0] == rows and shape[2:] == (length, length):
        # Who attends to whom.
        return (2, 3)
    return None
