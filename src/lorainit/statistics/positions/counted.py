"""Which positions of a layer's input are counted: padding never is.

Of a mask of who attends to whom, ``(batch, heads, length, length)``, the positions count that may attend
to themselves. Where an encoder takes fewer steps than its input (speech), its own account of the lengths
says which count. Which mask is a layer's is found in `lorainit.statistics.positions.model_calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.data.packing import packed_segments
from lorainit.errors import DataError
from lorainit.statistics.loss.batch_loss import label_kind
from lorainit.types import IGNORED

Lengths = Callable[[Tensor, int], Tensor | None]
"""How many steps a model makes of inputs so long, given that it makes so many of the last; None: no telling."""


@dataclass(frozen=True)
class CountedPositions:
    """One mask, as the flat indices of the positions that count.

    Attributes:
        shape: ``(rows, length)`` of the mask.
        indices: flat indices that count, or None where all do.
        lengths: positions that count in each row, ``(rows,)``, where these are the row's first.
        shorter: the model's account of how many steps it makes of so many.
        fewer: the same of fewer steps that were made of these, by their number.
    """

    shape: tuple[int, int]
    indices: Tensor | None
    lengths: Tensor | None = None
    shorter: Lengths | None = None
    fewer: dict[int, CountedPositions | None] = field(default_factory=dict, repr=False)
    _spreads: dict[torch.Size, CountedPositions] = field(default_factory=dict, repr=False)

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
        """This mask, or one made of it, if one fits the input.

        That of the fewer steps that the model makes of it; or of inputs with one more dimension beside
        rows and positions, such as heads.
        """
        if self.matches(leading):
            return self
        rows, length = self.shape
        if (
            len(leading) == 3
            and leading[0] == rows
            and (leading[1] == length) != (leading[2] == length)
        ):
            if leading not in self._spreads:
                self._spreads[leading] = self._spread(leading)
            return self._spreads[leading]
        if leading.numel() % rows:
            return None
        steps = leading.numel() // rows
        if steps not in self.fewer:
            if self.shorter is None or self.lengths is None:
                return None
            self.fewer[steps] = self._of_steps(steps)
        fewer = self.fewer[steps]
        return fewer if fewer is not None and fewer.matches(leading) else None

    def indices_for(
        self, leading: torch.Size, rows: tuple[Tensor, int] | None = None
    ) -> tuple[Tensor | None, bool]:
        """Flat indices that count for an input of these leading dimensions, None for all.

        Args:
            leading: dimensions of the input but its last.
            rows: where the input is a choice of the model's positions: which, and of how many.

        Returns:
            The indices; and whether they are known: if not, there is padding, and no telling where.
        """
        if self.indices is None:
            return None, True
        if rows is not None:
            chosen, total = rows
            if total != self.shape[0] * self.shape[1]:
                return None, False
            kept = torch.isin(chosen, self.indices.to(chosen.device))
            return kept.nonzero().squeeze(1), True
        found = self.lying_like(leading)
        if found is not None:
            return found.indices, True
        # One vector a sample has no padding.
        return None, leading.numel() == self.shape[0]

    @cached_property
    def length_first(self) -> CountedPositions:
        """The same of inputs that lie as ``(length, rows)``."""
        rows, length = self.shape
        indices = self.indices
        if indices is not None:
            indices = (indices % length * rows + indices // length).sort().values
        return CountedPositions((length, rows), indices)

    def beside(self, streams: int) -> CountedPositions:
        """The same of inputs that hold so many copies of the positions, one copy after the other."""
        rows, length = self.shape
        return self._spread(torch.Size((rows, streams, length)))

    def _spread(self, leading: torch.Size) -> CountedPositions:
        """The same over a third dimension, before or after that of the positions."""
        rows, length = self.shape
        shape = (rows, leading[1] * leading[2])
        if self.indices is None:
            return CountedPositions(shape, None)
        kept = torch.zeros(rows * length, dtype=torch.bool, device=self.indices.device)
        kept[self.indices] = True
        axis = 2 if leading[1] == length else 1
        flat = kept.reshape(rows, length).unsqueeze(axis).expand(leading).reshape(-1)
        return CountedPositions(shape, flat.nonzero().squeeze(1))

    def _of_steps(self, steps: int) -> CountedPositions | None:
        assert self.lengths is not None
        assert self.shorter is not None
        length = self.shape[1]
        both = self.shorter(torch.cat([self.lengths, self.lengths.new_tensor([length])]), steps)
        if both is None:
            return None
        kept = torch.arange(steps, device=both.device) < both[:-1, None]
        place = torch.device("cpu") if self.indices is None else self.indices.device
        return positions_of(kept, place)


def positions_of(
    mask: Tensor, device: torch.device, shorter: Lengths | None = None
) -> CountedPositions:
    """The positions of a mask ``(rows, length)``, or ``(batch, choices, length)``, that are not zero.

    Models run choices as ``(batch * choices, length)``.
    """
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


def up_to_the_last_label(labels: Tensor) -> Tensor:
    """``(rows, length)`` booleans: decoder inputs are the labels shifted by one; the rest is padding."""
    return (labels != IGNORED).long().flip(1).cumsum(1).flip(1) > 0


def label_positions(
    model: nn.Module, batch: Mapping[str, Any], device: torch.device
) -> CountedPositions:
    """Positions that predict a label of their own sequence, the one after them.

    Raises:
        DataError: the labels are not those of a causal language model.
    """
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
    return positions_of(predicts, device)


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


def attended_keys(mask: object, rows: int, length: int) -> Tensor | None:
    """``(rows, length)`` booleans of a mask that a block was given, whichever of its forms it has.

    ``(rows, length)`` or ``(rows, 1, 1, length)`` of keys, or of who attends to whom: of keys alone, as
    in cross-attention, those count that anything attends to. Floating masks are added to the scores,
    where what is far below zero is not attended to. None where it is no such mask.
    """
    if not isinstance(mask, Tensor) or mask.shape[:1] != (rows,) or mask.shape[-1] != length:
        return None
    if mask.dim() == 4 and mask.shape[1] != 1:
        mask = mask[:, :1]
    if mask.dim() == 4 and mask.shape[2] == length:
        return attends_to_itself(mask)
    if mask.dim() == 4 and mask.shape[2] > 1:
        mask = mask.amax(2) if mask.is_floating_point() else mask.any(2)
    if mask.numel() != rows * length:
        return None
    keys = mask.reshape(rows, length)
    if keys.is_floating_point() and not (float(keys.max()) == 1 and float(keys.min()) >= 0):
        return keys > torch.finfo(keys.dtype).min / 2
    return keys != 0


_STEPS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


def steps_of(base: nn.Module, lengths: Tensor, last: int) -> Tensor | None:
    """How many steps a speech model makes of inputs so long, by the helper that some part of it has.

    Args:
        base: the model.
        lengths: ``(inputs,)`` integers.
        last: how many it makes of the last input: helpers that say otherwise are another model's.
    """
    for part in base.modules():
        for helper in (getattr(part, name, None) for name in _STEPS):
            if callable(helper):
                found = _steps(helper, lengths)
                if found is not None and int(found[-1]) == last:
                    return found
    return None


def _steps(helper: Callable[..., object], lengths: Tensor) -> Tensor | None:
    try:
        return _last(helper(lengths))
    except (TypeError, ValueError):
        # Some count one length at a time.
        counts: list[Any] = [helper(n) for n in lengths.tolist()]
        return torch.tensor([int(n) for n in counts], device=lengths.device)


def _last(found: object) -> Tensor | None:
    """Some give the lengths after each of two stages."""
    found = found[-1] if isinstance(found, tuple) and found else found
    return found.long() if isinstance(found, Tensor) else None
