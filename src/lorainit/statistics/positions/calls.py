"""A part of the model that is running, what it was given and gave, and masks that were read."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.statistics.positions.call_tensors import entries
from lorainit.statistics.positions.counted import CountedPositions


@dataclass(frozen=True)
class InputPositions:
    """Which positions of one input count.

    Attributes:
        mask: None where all do.
        known: whether it is known where padding is, if there is any.
    """

    mask: CountedPositions | None = None
    known: bool = True


@dataclass(frozen=True, eq=False)
class Output:
    """What a part gave: a tensor, where its positions count, and how many there are."""

    tensor: weakref.ref[Tensor]
    found: InputPositions
    count: int


@dataclass(eq=False)
class Call:
    """A part of the model that is running.

    Attributes:
        arguments: of its forward, by name.
        tokens: what the mask is of: its token ids or their embeddings, or else its first tensor.
        shape: ``(rows, length)`` of ids or embeddings; None of images and sound.
        found: which of these positions count.
        last: what the newest part inside of it gave.
        blocks: blocks of layers that are running, each with its arguments.
    """

    module: nn.Module
    arguments: dict[str, Any]
    tokens: Tensor | None
    shape: tuple[int, ...] | None
    found: InputPositions = InputPositions()
    last: Output | None = None
    blocks: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


@dataclass(eq=False)
class KnownMasks:
    """Positions of masks that were read before, by where they are and the shape that they are read in."""

    _found: dict[tuple[object, torch.Size], tuple[weakref.ref[Tensor], CountedPositions]] = field(
        default_factory=dict
    )

    def get(self, mask: Tensor, shape: torch.Size) -> CountedPositions | None:
        """What is known of a mask that still exists: another may come to lie where it was."""
        known, found = self._found.get((entries(mask), shape), (None, None))
        return found if known is not None and known() is not None else None

    def keep(self, mask: Tensor, shape: torch.Size, found: CountedPositions) -> CountedPositions:
        """Remember what a mask says."""
        self._found[entries(mask), shape] = (weakref.ref(mask), found)
        return found

    def clear(self) -> None:
        """Forget them."""
        self._found.clear()
