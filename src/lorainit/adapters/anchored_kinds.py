"""Anchored factors of linear layers and of convolutions: their forward passes, and how they come to be."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredFactor, note_sizes
from lorainit.errors import AdapterError


class _AnchoredA(AnchoredFactor):
    """``x -> [A x, A0 x]``, with ``A`` and ``A0`` both ``(rank, in)``."""

    rank_dim = 0


class _AnchoredB(AnchoredFactor):
    """``[z, z0] -> B z - B0 z0``, with ``B`` and ``B0`` both ``(out, rank)``."""

    rank_dim = 1


class AnchoredA(_AnchoredA, nn.Linear):
    """The first factor of a linear layer."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., 2 rank)``."""
        trained, anchor = self.halves()
        return torch.cat([F.linear(x, trained), F.linear(x, anchor)], dim=-1)


class AnchoredB(_AnchoredB, nn.Linear):
    """The second factor of a linear layer."""

    plain = nn.Linear

    def forward(self, z: Tensor) -> Tensor:
        """``(..., 2 rank)`` to ``(..., out)``."""
        trained, anchor = self.halves()
        live, start = z.chunk(2, dim=-1)
        out = F.linear(live, trained) + F.linear(start, anchor)
        return out if self.bias is None else out + self.bias


class _ConvolvedA(_AnchoredA):
    """The first factor of a convolution, of its kernel and stride."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, *size)`` to ``(batch, 2 rank, *locations)``."""
        convolve: Any = self._conv_forward
        return torch.cat(
            [convolve(x, half, None) for half in self.halves()], dim=-self.anchor.dim() + 1
        )


class _ConvolvedB(_AnchoredB):
    """The second factor of a convolution, of kernel 1."""

    def forward(self, z: Tensor) -> Tensor:
        """``(batch, 2 rank, *locations)`` to ``(batch, out, *locations)``."""
        convolve: Any = self._conv_forward
        trained, anchor = self.halves()
        live, start = z.chunk(2, dim=-self.anchor.dim() + 1)
        return convolve(live, trained, self.bias) + convolve(start, anchor, None)  # type: ignore[no-any-return]


class AnchoredConv1dA(_ConvolvedA, nn.Conv1d):
    """`_ConvolvedA` in one dimension."""

    plain = nn.Conv1d


class AnchoredConv1dB(_ConvolvedB, nn.Conv1d):
    """`_ConvolvedB` in one dimension."""

    plain = nn.Conv1d


class AnchoredConv2dA(_ConvolvedA, nn.Conv2d):
    """`_ConvolvedA` in two dimensions."""

    plain = nn.Conv2d


class AnchoredConv2dB(_ConvolvedB, nn.Conv2d):
    """`_ConvolvedB` in two dimensions."""

    plain = nn.Conv2d


Side = Literal["A", "B"]

_KINDS: dict[type[nn.Module], dict[Side, type[AnchoredFactor]]] = {
    nn.Linear: {"A": AnchoredA, "B": AnchoredB},
    nn.Conv1d: {"A": AnchoredConv1dA, "B": AnchoredConv1dB},
    nn.Conv2d: {"A": AnchoredConv2dA, "B": AnchoredConv2dB},
}


def can_be_anchored(factor: nn.Module) -> bool:
    """Whether a factor has an anchor or can get one: it is of PEFT's own class, and of no other."""
    return isinstance(factor, AnchoredFactor) or type(factor) in _KINDS


def give_anchor(factor: nn.Module, side: Side, anchor: Tensor, *, experts: int = 1) -> None:
    """Turn PEFT's factor of rank ``r`` into an anchored one, in place.

    Args:
        factor: an ``nn.Linear`` or a convolution, or an anchored factor, which gets another anchor.
        side: which of the two factors it is.
        anchor: of the shape of its weight: ``A0``, or ``-B0``. Kept, not copied.
        experts: how many pairs of factors lie in it.

    Raises:
        AdapterError: some other module.
    """
    if type(factor) in _KINDS:
        factor.__class__ = _KINDS[type(factor)][side]
    elif not isinstance(factor, _KINDS[getattr(factor, "plain", nn.Linear)][side]):
        raise AdapterError(
            f"PEFT's factor is a {type(factor).__name__}, not the nn.Linear that an anchor can be given to. "
            "Use a method without an anchor, such as lorainit.EVA()."
        )
    assert isinstance(factor, AnchoredFactor)
    factor.anchor, factor.experts, factor.is_copy = anchor, experts, False
    note_sizes(factor, factor.whole_shape)


def anchor_whole(factor: nn.Module, side: Side, *, experts: int = 1) -> None:
    """Turn a factor of rank ``2 r``, as an anchored adapter is saved, into an anchored one, in place.

    Args:
        factor: PEFT's, an ``nn.Linear`` or a convolution; its parameter is replaced.
        side: which of the two factors it is.
        experts: how many pairs of factors lie in it.
    """
    whole: nn.Parameter = factor.weight  # type: ignore[assignment]
    shape = list(whole.shape)
    shape[0 if side == "A" else 1] //= 2
    give_anchor(factor, side, whole.new_empty(shape, device="meta"), experts=experts)
    factor.weight = whole
