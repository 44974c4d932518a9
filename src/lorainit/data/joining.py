"""Rows of several batches as one batch: pieces that were held back of each run together again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorainit.data.batch import Batch
from lorainit.types import IGNORED

_PADDING = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
"""What fills up rows of tokens on the right, where a mask says that it does not count."""


def joined(batches: Iterable[Batch], rows: int, positions: int) -> list[Batch]:
    """The same rows in the same order, neighbours together where they can be.

    Rows that are packed, images whose patches are counted otherwise, and anything that is no tensor with
    one entry a row stay as they are. Rows of tokens of several lengths are filled up where they have a mask.

    Args:
        batches: one after the other.
        rows: most of a batch.
        positions: most of a batch, padding counted.
    """
    found: list[Batch] = []
    for batch in batches:
        both = _together(found[-1], batch) if found else None
        if both is not None and both.rows <= rows and both.positions <= positions:
            found[-1] = both
        else:
            found.append(batch)
    return found


def _together(first: Batch, second: Batch) -> Batch | None:
    """Both, or None where they do not go together."""
    one, other = first.keywords, second.keywords
    if one.keys() != other.keys() or not (_is_plain(first) and _is_plain(second)):
        return None
    if any(one[key].dtype != other[key].dtype or one[key].dim() != other[key].dim() for key in one):
        return None
    if any(one[key].shape[1:] != other[key].shape[1:] for key in one):
        if not (_is_tokens(one) and _is_tokens(other)):
            return None
        length = max(one["input_ids"].shape[1], other["input_ids"].shape[1])
        one, other = ({k: _filled(k, v, length) for k, v in c.items()} for c in (one, other))
    content = {key: torch.cat([one[key], other[key]]) for key in one}
    return Batch(content, first.index)


def _is_plain(batch: Batch) -> bool:
    """Whether it is tensors with one entry a row, and every row one sequence."""
    return (
        not batch.owners
        and batch.separable
        and batch.units == batch.sequences == batch.rows
        and all(
            isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch.rows
            for value in batch.keywords.values()
        )
    )


def _is_tokens(content: Mapping[str, Tensor]) -> bool:
    """Whether all of it is rows of tokens of one length, and a mask of them."""
    shape = content["input_ids"].shape if "input_ids" in content else None
    return "attention_mask" in content and all(
        key in _PADDING and value.shape == shape for key, value in content.items()
    )


def _filled(key: str, value: Tensor, length: int) -> Tensor:
    """Filled up on the right."""
    more = value.new_full((value.shape[0], length - value.shape[1]), _PADDING[key])
    return torch.cat([value, more], dim=1)
