"""Images of a batch whose tensors are not one entry a row: which row each entry belongs to.

Models that take images of any size hold all images' patches in one tensor, one after the other, and say
how many there are by a grid an image; others hold all images in one tensor, some rows having more than
others. Both tell by placeholder tokens where an image stands. Images are in the order of their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_KINDS = {
    "image": (("pixel_values", "image_grid_thw"), ("image_token_id", "image_token_index")),
    "video": (("pixel_values_videos", "video_grid_thw"), ("video_token_id", "video_token_index")),
}
"""Names that transformers' models use: the tensors, and where the configuration tells the token."""


def image_owners(content: Mapping[str, Any], rows: int, config: object) -> dict[str, Tensor]:
    """The row of each entry of the tensors of images, by key; without those that cannot be told.

    Args:
        content: keywords of the model's forward.
        rows: of the batch.
        config: the model's configuration, or None.
    """
    ids = content.get("input_ids")
    if config is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != rows:
        return {}
    found: dict[str, Tensor] = {}
    for (values, grid), names in _KINDS.values():
        pixels, grids = content.get(values), content.get(grid)
        token = next((t for n in names if isinstance(t := getattr(config, n, None), int)), None)
        if not isinstance(pixels, Tensor) or token is None:
            continue
        tokens = (ids == token).sum(1).tolist()
        if isinstance(grids, Tensor):
            patches = grids.long().prod(-1).tolist()
            images = _rows_of_images(_tokens_of(patches, sum(tokens)), tokens)
            if images is not None and sum(patches) == pixels.shape[0]:
                found[grid] = torch.tensor(images, dtype=torch.long)
                found[values] = found[grid].repeat_interleave(torch.tensor(patches))
        elif pixels.shape[0] != rows:
            # As many tokens an image.
            count = pixels.shape[0]
            images = _rows_of_images(_tokens_of([1] * count, sum(tokens)), tokens)
            if images is not None:
                of_image = torch.tensor(images, dtype=torch.long)
                for key, value in content.items():
                    if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
                        found[key] = of_image
    return found


def _tokens_of(sizes: list[int], tokens: int) -> list[int] | None:
    """Tokens of each image, where all have as many a patch; None where that does not come out."""
    total = sum(sizes)
    if not total or not tokens or any(size * tokens % total for size in sizes):
        return None
    return [size * tokens // total for size in sizes]


def _rows_of_images(images: list[int] | None, rows: list[int]) -> list[int] | None:
    """The row of each image, where every row holds whole images one after the other.

    Args:
        images: tokens of each image.
        rows: tokens of each row.
    """
    if images is None or sum(images) != sum(rows):
        return None
    ends = list(accumulate(rows))
    reached, row, found = 0, 0, []
    for size in images:
        while row < len(ends) and reached >= ends[row]:
            row += 1
        reached += size
        if row == len(ends) or reached > ends[row]:
            return None
        found.append(row)
    return found
