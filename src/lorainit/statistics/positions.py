"""Which positions of a layer's input are counted: padding never is.

A decoder's and an encoder's layers each have a mask of their own. Where a layer's input does not
lie like the batch's mask (one vector a sample, image patches), all its positions count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.errors import DataError
from lorainit.statistics.losses import IGNORED, innermost, label_kind, packed_segments
from lorainit.types import TokenMask


@dataclass(frozen=True)
class CountedPositions:
    """One mask, as the flat indices of the positions that count.

    Attributes:
        shape: ``(rows, length)`` of the mask.
        indices: flat indices that count, or None where all do.
    """

    shape: tuple[int, int]
    indices: Tensor | None

    def matches(self, leading: torch.Size) -> bool:
        """Whether an input with these leading dimensions lies like this mask."""
        dims = [d for d in leading if d != 1] if leading[-2:] != self.shape else list(leading)
        total = leading.numel()
        rows, length = self.shape
        if total != rows * length:
            return False
        # (B, T), (B * T,), and either with leading axes of one.
        return tuple(dims[-2:]) == self.shape or len(dims) <= 1 or 1 in self.shape


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
        return mask.indices if mask.matches(leading) else None


def batch_positions(
    model: nn.Module, batch: Mapping[str, Any], token_mask: TokenMask, device: torch.device
) -> BatchPositions:
    """The masks of one batch, made on the batch's own device so that nothing waits."""
    attention = batch.get("attention_mask")
    labels = batch.get("labels")
    config = getattr(innermost(model), "config", None)
    if token_mask == "labels":
        return BatchPositions(_label_positions(model, batch, device), None)
    own = _from_mask(attention, device)
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


def _from_mask(mask: object, device: torch.device) -> CountedPositions | None:
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3):
        return None
    # Multiple choice: (batch, choices, length), which models run as (batch * choices, length).
    mask = mask.flatten(0, -2)
    flat = mask.reshape(-1) != 0
    indices = None if bool(flat.all()) else flat.nonzero().squeeze(1).to(device, non_blocking=True)
    return CountedPositions((mask.shape[0], mask.shape[1]), indices)
