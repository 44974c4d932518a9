"""The anchor: a frozen starting pair whose contribution is subtracted in the layer's forward.

An anchored layer computes ``W x + s (B A - B0 A0) x``. To PEFT it is an ordinary adapter of rank
``2 r`` of which half is frozen::

    lora_A = [A; A0]      lora_B = [B, -B0]

so merging, unmerging, weighting, saving and loading are PEFT's own and right, over every kind of
base layer, quantized ones too; and what is saved is plain LoRA on the untouched base. Inside, the
two halves are multiplied by products of one shape, and their difference is exactly zero at the
start.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, the same on every process, sharded as `like` is; itself where that is not sharded."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole value: nothing travels.
    sharded: Tensor = distribute_tensor(value, mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return sharded


def whole_of(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all processes; any other as it is."""
    gather = getattr(value, "full_tensor", None)
    whole: Tensor = value if gather is None else gather()
    return whole


class _AnchoredFactor(nn.Module):
    """Half trained, half frozen; a plain factor of twice the rank in every state dict.

    Attributes:
        trained: parameter, the half that learns; that of `held`, where there is one.
        anchor: buffer of the same shape, the start, written when the adapter is started alone. It is
            whole on every process, also where `trained` is sharded.
        experts: how many pairs of factors lie in this one, as PEFT lays out a stacked parameter's.
    """

    _rank_dim: int
    _sign: float

    trained: nn.Parameter
    anchor: Tensor

    def __init__(self, start: Tensor, anchor: Tensor | None = None, *, experts: int = 1) -> None:
        super().__init__()
        self.experts = experts
        anchor = start if anchor is None else anchor
        # Contiguous, whatever the solver's layout: a reloaded factor is, and fused optimizers pair
        # its elements with their saved state by memory order.
        layout = torch.contiguous_format
        self.trained = nn.Parameter(start.detach().clone(memory_format=layout))
        copy = anchor.detach().clone(memory_format=layout)
        self.register_buffer("anchor", copy, persistent=False)

    @classmethod
    def around(cls, held: nn.Module, *, experts: int = 1) -> Self:
        """Around a linear layer whose weight is sharded: its parameter learns, the anchor is zero.

        What shards a parameter knows it by its module and name, so both stay as they are; the module
        becomes a part of this one.
        """
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.experts = experts
        weight: Tensor = held.weight  # type: ignore[assignment]
        anchor = torch.zeros(tuple(weight.shape), dtype=weight.dtype, device=weight.device)
        new.register_buffer("anchor", anchor, persistent=False)
        held.__class__ = _Held
        new.held = held
        return new

    def __getattr__(self, name: str) -> Any:
        """Parameters of the module that it was put around are its own."""
        if name in ("trained", "bias"):
            held = self.__dict__.get("_modules", {}).get("held")
            if held is not None:
                return held.weight if name == "trained" else held.bias
        return super().__getattr__(name)

    def restart(self, start: Tensor | None, anchor: Tensor | None) -> None:
        """Write both halves in place.

        Args:
            start: for the trained half, which stays as it is where this is None.
            anchor: whole or sharded; None for zeros.
        """
        with torch.no_grad():
            if start is not None:
                self.trained.copy_(placed_like(start, self.trained))
            if anchor is None:
                self.anchor.zero_()
            else:
                self.anchor.copy_(whole_of(anchor))

    @property
    def rank(self) -> int:
        """Rank of the trained half."""
        return self.trained.shape[self._rank_dim] // self.experts

    @property
    def weight(self) -> Tensor:
        """The factor of twice the rank, as PEFT reads it; gradients flow to the trained half."""
        start = self._sign * self._start()
        if self.experts == 1:
            return torch.cat([self.trained, start], dim=self._rank_dim)
        both = [self._stacked(half, self.experts) for half in (self.trained, start)]
        return torch.cat(both, dim=1).flatten(self._rank_dim, self._rank_dim + 1)

    @classmethod
    def _stacked(cls, factor: Tensor, experts: int) -> Tensor:
        """With the rank in dimension one: ``(experts, rank, .)`` or ``(., rank, experts)``."""
        rows, columns = factor.shape
        if cls._rank_dim == 0:
            return factor.reshape(experts, -1, columns)
        return factor.reshape(rows, -1, experts)

    @classmethod
    def _halves(cls, whole: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """The trained half of a plain factor of twice the rank, and the anchor: see `weight`."""
        if experts == 1:
            trained, anchor = whole.chunk(2, dim=cls._rank_dim)
        else:
            trained, anchor = (
                half.flatten(cls._rank_dim, cls._rank_dim + 1)
                for half in cls._stacked(whole, experts).chunk(2, dim=1)
            )
        return trained, cls._sign * anchor

    @classmethod
    def of_whole(cls, whole: Tensor, bias: Tensor | None = None, *, experts: int = 1) -> Self:
        """From a plain factor of twice the rank, as it was saved."""
        extra = {} if bias is None else {"bias": bias}
        return cls(*cls._halves(whole, experts), **extra, experts=experts)

    def _start(self) -> Tensor:
        """The anchor in the trained half's dtype, and sharded as that is, whoever changed it."""
        like = self.trained
        return placed_like(self.anchor.to(device=like.device, dtype=like.dtype), like)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        whole = state_dict.get(key)
        if whole is None:
            missing_keys.append(key)
            return
        expected = list(self.trained.shape)
        expected[self._rank_dim] *= 2
        if list(whole.shape) != expected:
            error_msgs.append(
                f"{key}: an anchored adapter loads a factor of shape {tuple(expected)} (twice the "
                "rank, "
                f"start included), but the file has {tuple(whole.shape)}. It was saved from an "
                "adapter "
                "of another rank or without an anchor: load it with PeftModel.from_pretrained."
            )
            return
        trained, anchor = self._halves(whole, self.experts)
        with torch.no_grad():
            self.trained.copy_(placed_like(trained, self.trained))
            self.anchor.copy_(whole_of(anchor))


class _Held(nn.Linear):
    """A linear layer inside an anchored factor, in whose name it is saved and loaded."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class AnchoredA(_AnchoredFactor):
    """``x -> [A x, A0 x]``, with ``A`` and ``A0`` both ``(rank, in)``."""

    _rank_dim = 0
    _sign = 1.0

    @property
    def in_features(self) -> int:
        """Columns of ``A``."""
        return self.trained.shape[1]

    @property
    def out_features(self) -> int:
        """Twice the rank: what PEFT sees."""
        return 2 * self.trained.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., 2 rank)``."""
        return torch.cat([F.linear(x, self.trained), F.linear(x, self._start())], dim=-1)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"in_features={self.in_features}, rank={self.rank}, anchored"


class AnchoredB(_AnchoredFactor):
    """``[z, z0] -> B z - B0 z0``, with ``B`` and ``B0`` both ``(out, rank)``."""

    _rank_dim = 1
    _sign = -1.0

    bias: nn.Parameter | None

    def __init__(
        self,
        start: Tensor,
        anchor: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        experts: int = 1,
    ) -> None:
        super().__init__(start, anchor, experts=experts)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def in_features(self) -> int:
        """Twice the rank: what PEFT sees."""
        return 2 * self.trained.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of ``B``."""
        return self.trained.shape[0]

    def forward(self, z: Tensor) -> Tensor:
        """``(..., 2 rank)`` to ``(..., out)``."""
        live, start = z.chunk(2, dim=-1)
        out = F.linear(live, self.trained) - F.linear(start, self._start())
        return out if self.bias is None else out + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.bias is not None and prefix + "bias" in state_dict:
            with torch.no_grad():
                self.bias.copy_(state_dict[prefix + "bias"])

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"rank={self.rank}, out_features={self.out_features}, anchored"
