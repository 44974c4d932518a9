"""Rows padded to one batch, as a collator pads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
_FILL = {"labels": -100}
_BY_POSITION = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "decoder_input_ids",
    "input_values",
    "input_features",
    "labels",
    "image_attention_mask",
    "cross_attention_mask",
    "image_embeds_position_mask",
)


def padded(rows: Sequence[Row]) -> Row | None:
    """One batch of several rows, padded on the right; None where these cannot be padded.

    Rows of one length need no mask; others are padded only where a mask says so.
    """
    batch: Row = {}
    for key in rows[0]:
        values: list[Tensor] = [row[key] for row in rows]
        patches = "image_grid_thw" in rows[0] and key == "pixel_values"
        if patches or len({value.shape[1:] for value in values}) == 1:
            batch[key] = torch.cat(values)
            continue
        if key not in _BY_POSITION or (key != "labels" and "attention_mask" not in rows[0]):
            return None
        length = max(value.shape[1] for value in values)
        batch[key] = torch.cat([_longer(value, length, _FILL.get(key, 0)) for value in values])
    return batch


def _longer(value: Tensor, length: int, fill: int) -> Tensor:
    missing = value.new_full((1, length - value.shape[1], *value.shape[2:]), fill)
    return torch.cat([value, missing], 1)
