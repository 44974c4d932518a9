"""Rows of text with an image or a sound: the first form that the model takes and that moves its encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, nn

from benchmarks.architectures.tiny.images import Form, forms
from benchmarks.architectures.tiny.text import tokens

Row = dict[str, Any]
_LENGTHS = (6, 4, 5, 3, 6, 4, 5, 3)
_TRIED = (0, 1, 4, 16)
"""How many tokens may stand for an image; a model that wants another number says so."""
_WANTED = re.compile(r"tokens:? ?(\d+),? ?(?:and |number of )?features:? ?(?:torch.Size\(\[)?(\d+)")
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "audio_token_id",
    "audio_token_index",
    "media_placeholder_token_id",
    "image_patch_id",
    "im_patch_id",
)
_SEES = ("vision", "visual", "image", "encoder", "vit", "patch", "img", "audio")
_NO_PLACEHOLDER = 5


@dataclass(frozen=True)
class Maker:
    """Makes rows of one form.

    Attributes:
        form: of the image; None: text alone.
        counts: how many tokens stand for the image of an even row, and of an odd one.
    """

    model: nn.Module
    arguments: tuple[str, ...]
    generator: Generator
    form: Form | None
    counts: tuple[int, int]

    def row(self, i: int) -> Row:
        placeholder = _placeholder(self.model.config)
        count = self.counts[i % 2]
        image = {} if self.form is None else self.form(i)
        before, after = tokens(self.generator, 2), tokens(self.generator, _LENGTHS[i])
        known = placeholder if placeholder is not None else _NO_PLACEHOLDER
        ids = torch.cat([before, torch.full((1, count), known), after], 1)
        labels = ids.clone()
        labels[:, : 2 + count] = -100
        row: Row = {"input_ids": ids, "labels": labels, **image}
        own = {
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == (-1 if placeholder is None else placeholder)).long(),
            "token_type_ids": torch.zeros_like(ids),
            "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
            "image_embeds_position_mask": (ids == _NO_PLACEHOLDER).long(),
        }
        row |= {key: value for key, value in own.items() if key in self.arguments and image}
        row |= {key: own[key] for key in ("attention_mask",) if key in self.arguments}
        if "aspect_ratio_ids" in image:
            row["cross_attention_mask"] = torch.ones(*ids.shape, 1, 4, dtype=torch.long)
        if "input_ids" not in self.arguments:
            del row["input_ids"]
        return row


def image_text_rows(
    model: nn.Module, arguments: tuple[str, ...], generator: Generator
) -> list[Row]:
    """Rows with an image each; of text alone where no form fits.

    Raises:
        RuntimeError: the model takes neither.
    """
    reasons: list[str] = []
    for form in forms(model.config, arguments, generator):
        for tried in _TRIED:
            maker = Maker(model, arguments, generator, form, (tried, tried))
            try:
                reason = _refusal(maker)
            except _Counted as counted:
                maker = Maker(model, arguments, generator, form, counted.counts)
                reason = _refusal(maker, final=True)
            if reason is None:
                return [maker.row(i) for i in range(len(_LENGTHS))]
            reasons.append(reason)
    maker = Maker(model, arguments, generator, None, (0, 0))
    reason = _refusal(maker, sees=False)
    if reason is None:
        return [maker.row(i) for i in range(len(_LENGTHS))]
    raise RuntimeError(f"no rows: {reason}; " + "; ".join(dict.fromkeys(reasons))[-300:])


class _Counted(Exception):
    """The model said how many tokens it wants."""

    def __init__(self, counts: tuple[int, int]) -> None:
        super().__init__()
        self.counts = counts


def _refusal(maker: Maker, *, sees: bool = True, final: bool = False) -> str | None:
    """Why the model does not take two rows of this form; None if it does."""
    for i in (0, 1):
        try:
            maker.model(**maker.row(i)).loss.backward()
            moved = any(
                p.grad is not None and float(p.grad.abs().sum()) > 0
                for n, p in maker.model.named_parameters()
                if any(part in n for part in _SEES)
            )
        except Exception as error:
            wanted = None if final else _wanted(maker, error)
            if wanted is not None:
                raise _Counted(wanted) from None
            return f"{type(error).__name__} {str(error)[:100]}"
        finally:
            maker.model.zero_grad(set_to_none=True)
        if sees and not moved:
            return "the image moves nothing"
    return None


def _wanted(maker: Maker, error: Exception) -> tuple[int, int] | None:
    """How many tokens an even and an odd row need, by the model's own messages."""
    if _WANTED.search(str(error)) is None:
        return None
    found = []
    for i in (0, 1):
        try:
            maker.model(**maker.row(i))
        except Exception as other:
            match = _WANTED.search(str(other))
            if match is None:
                return None
            given, wanted = int(match[1]), int(match[2])
            width = maker.model.config.get_text_config().hidden_size
            # Some count numbers, not vectors.
            if maker.counts[i] and given == width * maker.counts[i]:
                wanted //= width
            found.append(wanted)
        else:
            found.append(maker.counts[i])
    counts = (found[0], found[1])
    return None if counts == maker.counts else counts


def _placeholder(config: Any) -> int | None:
    for part in (config, getattr(config, "text_config", None)):
        for key in _PLACEHOLDERS:
            if isinstance(value := getattr(part, key, None), int):
                return value
    return None
