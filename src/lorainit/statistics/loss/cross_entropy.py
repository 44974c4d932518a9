"""Cross-entropy of token labels, a few positions at a time.

A vocabulary's logits are many: in float32, with their softmax and its gradient beside them, they are often
more than all that the layers keep for their backward. Here nothing of their size is made but their gradient,
in their own dtype; the softmax is taken in float32, and its gradient rounded once, as by PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit.linalg.dtypes import sum_dtype
from lorainit.types import IGNORED

_AT_ONCE = 2**22
"""Logits of a piece."""


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """``(n,)`` losses of ``(n, vocabulary)`` logits and ``(n,)`` targets, zero where a target is `IGNORED`.

    In float32, or in float64 where logits are; a target that is no entry of the vocabulary is PyTorch's own
    error. Differentiable once.
    """
    if type(logits) is not Tensor or not targets.numel():
        # What is distributed over devices has its own ways.
        wide = logits.to(sum_dtype(logits.dtype))
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    losses: Tensor = _TokenLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=sum_dtype(logits.dtype), device=logits.device)
        for own in _pieces(logits):
            wide = logits[own].to(losses.dtype)
            losses[own] = F.cross_entropy(
                wide, targets[own], ignore_index=IGNORED, reduction="none"
            )
        ctx.save_for_backward(logits, targets)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, weights: Tensor) -> Any:
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        counted = targets != IGNORED
        weights = (weights * counted).unsqueeze(-1)
        labels = targets.masked_fill(~counted, 0).unsqueeze(-1)
        for own in _pieces(logits):
            # d loss / d logits = softmax - one at the target.
            piece = torch.softmax(logits[own], -1, dtype=weights.dtype).mul_(weights[own])
            piece.scatter_add_(-1, labels[own], -weights[own])
            # Nothing comes of a position that does not count, not even of one that is not finite.
            gradient[own] = piece.masked_fill_(~counted[own].unsqueeze(-1), 0)
        return gradient, None


def _pieces(logits: Tensor) -> Iterator[slice]:
    step = max(1, _AT_ONCE // max(1, logits.shape[-1]))
    return (slice(first, first + step) for first in range(0, len(logits), step))
