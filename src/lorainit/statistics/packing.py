"""Packed rows: which sequence each position of a batch belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def packed_segments(batch: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each position belongs to, and where sequences after a row's first start.

    One row is one sequence, unless the batch says that rows are packed: by ``position_ids`` that
    return to zero, by ``seq_idx``, or by ``cu_seq_lens_q`` (one row).

    Returns:
        ``(rows, length)`` integers counting from zero through the batch, and a boolean
        ``(rows, length)``, both on the CPU.
    """
    rows, length = labels.shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    position_ids = batch.get("position_ids")
    if isinstance(batch.get("seq_idx"), Tensor) and batch["seq_idx"].shape == labels.shape:
        index = batch["seq_idx"].cpu()
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
    elif isinstance(batch.get("cu_seq_lens_q"), Tensor) and rows == 1:
        bounds = batch["cu_seq_lens_q"].cpu().long()
        starts[0, bounds[(bounds > 0) & (bounds < length)]] = True
    elif isinstance(position_ids, Tensor) and position_ids.shape == labels.shape:
        starts = position_ids.cpu() == 0
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            starts &= mask.cpu().bool()
        # The first start of a row is the row's own.
        starts &= starts.cumsum(dim=1) > 1
    within = starts.long().cumsum(dim=1)
    per_row = within[:, -1] + 1 if length else torch.ones(rows, dtype=torch.long)
    offsets = per_row.cumsum(0) - per_row
    return within + offsets.unsqueeze(1), starts
