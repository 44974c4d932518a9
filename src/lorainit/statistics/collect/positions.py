"""Which positions of a layer's input are counted: padding never is.

A decoder's and an encoder's layers each have a mask of their own. Of a mask of who attends to whom,
``(batch, heads, length, length)``, the positions count that may attend to themselves. Where an
encoder takes fewer steps than its input (speech), its own account of the lengths says which count.
Where a layer's input lies like none of these (one vector a sample, image patches), all its positions
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.data.packing import packed_segments
from lorainit.errors import DataError
from lorainit.models.introspection import innermost_model
from lorainit.statistics.loss.batch_loss import label_kind
from lorainit.types import IGNORED, TokenMask


@dataclass(frozen=True)
class CountedPositions:
    """One mask, as the flat indices of the positions that count.

    Attributes:
        shape: ``(rows, length)`` of the mask.
        indices: flat indices that count, or None where all do.
        lengths: positions that count in each row, ``(rows,)``, where these are the row's first.
        shorter: the model's account of how many steps it makes of so many.
    """

    shape: tuple[int, int]
    indices: Tensor | None
    lengths: Tensor | None = None
    shorter: Callable[[Tensor], Tensor | None] | None = None
    _fewer: dict[int, CountedPositions | None] = field(default_factory=dict, repr=False)

    def matches(self, leading: torch.Size) -> bool:
        """Whether an input with these leading dimensions lies like this mask."""
        dims = [d for d in leading if d != 1] if leading[-2:] != self.shape else list(leading)
        total = leading.numel()
        rows, length = self.shape
        if total != rows * length:
            return False
        # (B, T), (B * T,), and either with leading axes of one.
        return tuple(dims[-2:]) == self.shape or len(dims) <= 1 or 1 in self.shape

    def lying_like(self, leading: torch.Size) -> CountedPositions | None:
        """This mask, or that of the fewer steps that the model makes of it, if one fits the input."""
        if self.matches(leading):
            return self
        rows = self.shape[0]
        if self.shorter is None or self.lengths is None or leading.numel() % rows:
            return None
        steps = leading.numel() // rows
        if steps not in self._fewer:
            self._fewer[steps] = self._of_steps(steps)
        fewer = self._fewer[steps]
        return fewer if fewer is not None and fewer.matches(leading) else None

    def _of_steps(self, steps: int) -> CountedPositions | None:
        assert self.lengths is not None
        assert self.shorter is not None
        length = self.shape[1]
        both = self.shorter(torch.cat([self.lengths, self.lengths.new_tensor([length])]))
        if both is None or int(both[-1]) != steps:
            return None
        kept = torch.arange(steps, device=both.device) < both[:-1, None]
        place = torch.device("cpu") if self.indices is None else self.indices.device
        return _from_mask(kept, place)


@dataclass(frozen=True)
class BatchPositions:
    """The masks of one batch.

    Attributes:
        main: of the model's own layers (a decoder's, where there are two).
        encoder: of the encoder's layers and of what reads the encoder's output.
    """

    main: CountedPositions | None
    encoder: CountedPositions | None

    def indices_for(
        self,
        leading: torch.Size,
        *,
        reads_encoder: bool,
        rows: tuple[Tensor, int] | None = None,
    ) -> Tensor | None:
        """Flat indices that count for an input of these leading dimensions, None for all.

        Args:
            leading: dimensions of the input but its last.
            reads_encoder: whether the encoder's mask is the input's.
            rows: where the input is a choice of the model's positions: which, and of how many.
        """
        mask = self.encoder if reads_encoder else self.main
        if mask is None or mask.indices is None:
            return None
        if rows is not None:
            chosen, total = rows
            if total != mask.shape[0] * mask.shape[1]:
                return None
            kept = torch.isin(chosen, mask.indices.to(chosen.device))
            return kept.nonzero().squeeze(1)
        found = mask.lying_like(leading)
        return None if found is None else found.indices

    def unknown(
        self,
        leading: torch.Size,
        *,
        reads_encoder: bool,
        rows: tuple[Tensor, int] | None = None,
    ) -> bool:
        """Whether there is padding, and no telling which of the input's positions it is."""
        mask = self.encoder if reads_encoder else self.main
        if mask is None or mask.indices is None:
            return False
        if rows is not None:
            return rows[1] != mask.shape[0] * mask.shape[1]
        # One vector a sample has no padding.
        return leading.numel() != mask.shape[0] and mask.lying_like(leading) is None


def batch_positions(
    model: nn.Module, batch: Mapping[str, Any], token_mask: TokenMask, device: torch.device
) -> BatchPositions:
    """The masks of one batch, made on the batch's own device so that nothing waits."""
    attention = batch.get("attention_mask")
    labels = batch.get("labels")
    config = getattr(innermost_model(model), "config", None)
    if token_mask == "labels":
        return BatchPositions(_label_positions(model, batch, device), None)
    multiple_choice = isinstance(ids := batch.get("input_ids"), Tensor) and ids.dim() == 3
    if isinstance(attention, Tensor) and (
        attention.dim() == 4 or (attention.dim() == 3 and not multiple_choice)
    ):
        attention = attends_to_itself(attention)
    own = _from_mask(attention, device, partial(_steps, model))
    if not getattr(config, "is_encoder_decoder", False):
        return BatchPositions(own, None)
    decoder = batch.get("decoder_attention_mask")
    if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
        decoder = _up_to_the_last_label(labels)
    return BatchPositions(_from_mask(decoder, device), own)


def _up_to_the_last_label(labels: Tensor) -> Tensor:
    """Decoder inputs are the labels shifted by one; what follows the last label is padding."""
    return (labels != IGNORED).long().flip(1).cumsum(1).flip(1) > 0


def _label_positions(
    model: nn.Module, batch: Mapping[str, Any], device: torch.device
) -> CountedPositions:
    """Positions that predict a label of their own sequence, the one after them."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or label_kind(model, labels) != "causal":
        raise DataError(
            "token_mask='labels' counts the positions that predict a label, which only causal "
            "language "
            "models with (batch, length) labels have. Use token_mask='attention'."
        )
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    starts = packed_segments(batch, labels)[1].to(labels.device)
    predicts[:, :-1] = (labels != IGNORED)[:, 1:] & ~starts[:, 1:]
    mask = _from_mask(predicts, device)
    assert mask is not None
    return mask


def attends_to_itself(mask: Tensor) -> Tensor:
    """``(batch, length)`` booleans of a mask of who attends to whom, ``(batch, [heads,] length, keys)``.

    True or one is for what is attended to, or, in a floating mask that is added to the scores, zero
    against the dtype's lowest. Where there are more keys than positions (a cache), positions count
    that attend to anything.
    """
    if mask.is_floating_point() and not bool((mask > 0).any()):
        attends = mask > torch.finfo(mask.dtype).min / 2
    else:
        attends = mask > 0
    if attends.dim() == 4:
        attends = attends.any(1)
    if attends.shape[-1] == attends.shape[-2]:
        return attends.diagonal(dim1=-2, dim2=-1)
    return attends.any(-1)


def _steps(model: nn.Module, lengths: Tensor) -> Tensor | None:
    """How many steps a speech model makes of inputs so long, by the helper that some part of it has."""
    for part in innermost_model(model).modules():
        helper = getattr(part, "_get_feat_extract_output_lengths", None)
        if callable(helper):
            return _last(helper(lengths))
    return None


def _last(found: object) -> Tensor | None:
    """Some give the lengths after each of two stages."""
    found = found[-1] if isinstance(found, tuple) and found else found
    return found.long() if isinstance(found, Tensor) else None


def _from_mask(
    mask: object,
    device: torch.device,
    shorter: Callable[[Tensor], Tensor | None] | None = None,
) -> CountedPositions | None:
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        return None
    # Multiple choice: (batch, choices, length), which models run as (batch * choices, length).
    mask = mask.flatten(0, -2)
    flat = mask.reshape(-1) != 0
    indices = None if bool(flat.all()) else flat.nonzero().squeeze(1).to(device, non_blocking=True)
    shape = (mask.shape[0], mask.shape[1])
    if indices is None or shorter is None:
        return CountedPositions(shape, indices)
    counts = (mask != 0).sum(1)
    first = torch.arange(shape[1], device=mask.device) < counts[:, None]
    lengths = counts if bool(((mask != 0) == first).all()) else None
    return CountedPositions(shape, indices, lengths, shorter)
