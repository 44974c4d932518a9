"""Layers that are linear in something else than their input as it comes: how each is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from lorainit.models.convolution import Convolution
from lorainit.models.embedding import Lookup


class Form(Protocol):
    """A layer as ``y = W x`` at every position."""

    def positions(self, x: Tensor) -> Tensor:
        """The input with its positions' dimensions first, a view: ``(batch, ..., width)``."""

    def leading(self, x: Tensor | None, g: Tensor | None) -> tuple[int, ...]:
        """Dimensions of the output's positions, from its input or its output's gradient."""

    def rows(
        self, x: Tensor | None, g: Tensor | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Inputs and output gradients with a last dimension of ``in`` and ``out``, in parts, in order.

        One-hot inputs are given as the word's number, in a last dimension of one.
        """

    def low_rank(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What adding ``left right`` to ``W`` adds to the output; ``(out, rank)`` and ``(rank, in)``."""


def form_of(module: nn.Module) -> Form | None:
    """How a layer is linear; None where it is in its input as it comes."""
    return Convolution.of(module) or Lookup.of(module)
