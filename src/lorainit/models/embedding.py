"""Embeddings as linear layers over one-hot inputs.

The weight ``W`` is ``(out, words)``, the transpose of what is stored. A word's input has a one at its own
place: the second moment of inputs is the diagonal of how often each word occurs, and the gradient is zero but
for the words seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

PADDING = -1
"""The word of a position whose row of the weight is never trained (``padding_idx``)."""


@dataclass(frozen=True)
class Lookup:
    """How an embedding looks words up.

    Attributes:
        words: how many rows its weight has.
        padding: the word that it never learns; None where it learns all.
        scale: what it multiplies its rows by.
    """

    words: int
    padding: int | None
    scale: float

    @classmethod
    def of(cls, module: nn.Module) -> Lookup | None:
        """Of an ``nn.Embedding`` that `unserved_embedding` names no reason against; else None."""
        if not isinstance(module, nn.Embedding) or unserved_embedding(module) is not None:
            return None
        scale = getattr(module, "embed_scale", 1.0)
        return cls(module.num_embeddings, module.padding_idx, float(scale))

    def positions(self, x: Tensor) -> Tensor:
        """``(..., 1)``: words by position."""
        return x.unsqueeze(-1)

    def leading(self, x: Tensor | None, g: Tensor | None) -> tuple[int, ...]:
        """Dimensions of the positions."""
        if x is not None:
            return tuple(x.shape)
        assert g is not None
        return tuple(g.shape[:-1])

    def rows(
        self, x: Tensor | None, g: Tensor | None
    ) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Words ``(..., 1)``, `PADDING` where nothing is learnt, and gradients of ``W x``."""
        if x is not None:
            x = x.long()
            x = (
                x if self.padding is None else x.masked_fill(x == self.padding, PADDING)
            ).unsqueeze(-1)
        yield x, g if g is None or self.scale == 1 else g * self.scale

    def low_rank(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """What adding ``left right`` to ``W`` adds to the output; a padding's row stays."""
        if self.padding is not None:
            right = right.index_fill(1, x.new_tensor([self.padding]).long(), 0.0)
        return F.embedding(x, right.mT) @ left.mT * self.scale


def unserved_embedding(module: nn.Embedding) -> str | None:
    """Why an embedding is no linear layer over one-hot inputs that could be measured; None: it is one."""
    kind = type(module).__name__
    if module.max_norm is not None:
        return f"{kind} whose forward shortens its own rows (max_norm)"
    if module.scale_grad_by_freq:
        return f"{kind} whose gradient is divided by how often a word occurs (scale_grad_by_freq)"
    if "weight" not in module._parameters:
        return f"{kind} whose weight is computed anew in every forward"
    scale = getattr(module, "embed_scale", None)
    if type(module).forward is nn.Embedding.forward:
        return None if scale is None else f"{kind} with a scale that its forward does not read"
    one = isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1)
    return None if one else f"{kind} looks up by a rule of its own"
