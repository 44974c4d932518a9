"""The anchor: a frozen starting pair whose contribution is subtracted in the layer's forward.

An anchored layer computes ``W x + s (B A - B0 A0) x``. To PEFT it is an ordinary adapter of rank
``2 r`` of which half is frozen::

    lora_A = [A; A0]      lora_B = [B, -B0]

so merging, unmerging, weighting, swapping, saving and loading are PEFT's own and right, over every kind
of base layer, quantized ones too; and what is saved is plain LoRA on the untouched base. Inside, the two
halves are multiplied by products of one shape, and their difference is exactly zero at the start.

How the two halves are stored was chosen by trying three ways on one list of promises:

- *One storage of rank 2r, of which the trained half is a view.* Writes through either name are seen by
  both, but only until something gives the parameter another storage: ``.to``, ``deepcopy``,
  ``load_state_dict(assign=True)``, FSDP, DeepSpeed's flat buffers and optimizers that make parameters
  contiguous all do. The trained half of ``B`` is not contiguous in it, and experts' halves interleave.
- *One parameter of rank 2r, with the frozen half's gradient masked.* Everything by name works, but
  optimizers keep twice the state, weight decay moves the anchor, and DDP sends both halves.
- *An ordinary parameter of rank r beside a frozen tensor, and a weight that reads and writes both*
  (`FactorWeight`). Each half may be moved, sharded, flattened or replaced by itself. It is this one.

An anchored factor is the very module that PEFT made, with another class (`anchored_kinds`) and one more
attribute: the parameter keeps its name ``weight``, its place and its identity, so optimizers, hooks and
sharding that know it go on. The frozen half is neither parameter nor buffer, so nothing sends it to other
processes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorainit.adapters import named_readers
from lorainit.adapters.factor_weight import FactorWeight, weight_of
from lorainit.parallel.partitioned import is_partitioned


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


class AnchoredFactor(nn.Module):
    """A factor of twice the rank, half of it trained and half of it frozen.

    Each is also of one of PEFT's own classes of factors: a linear layer, or a convolution.

    Attributes:
        anchor: the frozen half: ``A0`` ``(rank, in)``, or ``-B0`` ``(out, rank)``, of a convolution with
            the kernel's dimensions. It is whole on every process, also where the parameter is sharded.
        experts: how many pairs of factors lie in this one, as PEFT lays out a stacked parameter's.
        is_copy: made from the configuration of an anchored adapter, to become a copy of it: it takes the
            trained half by itself, too, as ``named_parameters`` of the other gives it.
    """

    rank_dim: ClassVar[int]
    """Of its weight: 0 in A, 1 in B."""
    plain: ClassVar[type[nn.Module]]
    """PEFT's own class of this factor."""

    anchor: Tensor
    experts: int
    is_copy: bool

    @property
    def trained(self) -> Tensor:
        """The parameter: the half that learns; inside wrappers, whatever stands in its place."""
        held = self._parameters.get("weight")
        held = self.__dict__.get("weight") if held is None else held
        if held is None:
            raise AttributeError("this factor has no weight at present")
        return held

    @property
    def rank(self) -> int:
        """Rank of the trained half."""
        return self.anchor.shape[self.rank_dim] // self.experts

    @property
    def weight(self) -> Tensor:
        """The factor of twice the rank, to read and to write: a `FactorWeight`.

        Where something put a tensor of another shape in the parameter's place, for a while (a whole factor
        by ``functional_call`` or offloading, a flat part of it by FSDP1), it is that tensor. FSDP itself,
        which looks its parameters up by their names, gets the parameter.
        """
        trained = self.trained
        if trained.shape != self.anchor.shape:
            return trained
        if torch.compiler.is_compiling():
            return self.joined()
        if named_readers.shards(sys._getframe(1)):
            return trained
        if not isinstance(trained, nn.Parameter):
            return self.joined()
        return weight_of(self, self.whole_shape)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # nn.Module registers parameters itself: here FSDP1 sets what stands for one.
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def halves(self) -> tuple[Tensor, Tensor]:
        """The trained half and the anchor in its dtype, on its device, and sharded as it is."""
        trained = self.trained
        if trained.shape == self.whole_shape:
            return self.split(trained)
        anchor = self.anchor.to(device=trained.device, dtype=trained.dtype)
        return trained, placed_like(anchor, trained)

    def joined(self) -> Tensor:
        """See `Source`."""
        return self.join(*self.halves())

    def join(self, trained: Tensor, frozen: Tensor) -> Tensor:
        """The factor of twice the rank; every expert's halves lie together."""
        if self.experts == 1:
            return torch.cat([trained, frozen], dim=self.rank_dim)
        both = [self._stacked(half) for half in (trained, frozen)]
        return torch.cat(both, dim=1).flatten(self.rank_dim, self.rank_dim + 1)

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The trained half of a factor of twice the rank, and the anchor: the inverse of `join`.

        Raises:
            RuntimeError: of another shape.
        """
        if whole.shape != self.whole_shape:
            raise RuntimeError(self._unfit(whole))
        if self.experts == 1:
            trained, frozen = whole.chunk(2, dim=self.rank_dim)
        else:
            trained, frozen = (
                half.flatten(self.rank_dim, self.rank_dim + 1)
                for half in self._stacked(whole).chunk(2, dim=1)
            )
        return trained, frozen

    def write(self, whole: Tensor) -> None:
        """Copy a factor of twice the rank into both halves."""
        trained, anchor = self.split(whole)
        with torch.no_grad():
            self.trained.copy_(placed_like(trained, self.trained))
            self.anchor.copy_(whole_of(anchor))

    def replace(self, whole: Tensor) -> None:
        """What ``weight.data = whole`` does: of another rank, it becomes a plain factor of that rank."""
        trained = self.trained
        if whole.shape == self.whole_shape:
            half, anchor = (part.detach() for part in self.split(whole))
            if (whole.dtype, whole.device) != (trained.dtype, trained.device):
                trained.data = half.clone(memory_format=torch.contiguous_format)
                self.anchor = whole_of(anchor).clone(memory_format=torch.contiguous_format)
            else:
                self.write(whole)
            return
        same = [size for dim, size in enumerate(whole.shape) if dim != self.rank_dim]
        own = [size for dim, size in enumerate(trained.shape) if dim != self.rank_dim]
        if same != own or whole.shape[self.rank_dim] % self.experts:
            raise RuntimeError(self._unfit(whole))
        take_anchor(self)
        trained.data = whole
        note_sizes(self, whole.shape)

    def copy_trained(self, value: Tensor) -> bool:
        """Copy a trained half alone into a factor that is a copy; whether it was one."""
        if not self.is_copy or value.shape != self.trained.shape:
            return False
        with torch.no_grad():
            self.trained.copy_(placed_like(value, self.trained))
        return True

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also reached by setting ``weight`` to a parameter; one of twice the rank is split."""
        if name == "weight" and param is not None and param.shape == self.whole_shape:
            if isinstance(param, FactorWeight) and param._source is self:
                return
            trained, anchor = self.split(param.detach())
            self.anchor = whole_of(anchor).clone(memory_format=torch.contiguous_format)
            trained = trained.clone(memory_format=torch.contiguous_format)
            param = nn.Parameter(trained, param.requires_grad)
        super().register_parameter(name, param)

    @property
    def whole_shape(self) -> torch.Size:
        """Of the factor of twice the rank."""
        shape = list(self.anchor.shape)
        shape[self.rank_dim] *= 2
        return torch.Size(shape)

    def _stacked(self, factor: Tensor) -> Tensor:
        """With the rank in dimension one: ``(experts, rank, .)`` or ``(., rank, experts)``."""
        rows, columns = factor.shape
        if self.rank_dim == 0:
            return factor.reshape(self.experts, -1, columns)
        return factor.reshape(rows, -1, self.experts)

    def _unfit(self, whole: Tensor) -> str:
        return (
            f"an anchored adapter takes a factor of shape {tuple(self.whole_shape)} (twice the rank, start "
            f"included), not {tuple(whole.shape)}: that is of another rank or without an anchor. Load it "
            "with PeftModel.from_pretrained."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> AnchoredFactor:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.anchor = fn(self.anchor)
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As every module's; what loads a distributed state dictionary gets the whole factor, to fill."""
        found = super().named_parameters(prefix, recurse, remove_duplicate)
        if named_readers.loads_distributed(sys._getframe(1)):
            names = {name: self.joined() if name == "weight" else p for name, p in found}
            return iter(names.items())  # type: ignore[arg-type]
        return found

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As every module's; DeepSpeed, which saves what it finds by name, gets the whole factor."""
        found = super().named_buffers(prefix, recurse, remove_duplicate)
        if named_readers.saves_partitioned(sys._getframe(1)):
            return itertools.chain(found, [("weight", self.joined())])
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        trained = self.trained
        if trained.shape == self.anchor.shape:
            whole = self.joined()
            destination[prefix + "weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = prefix + "weight"
        rest = {k: v for k, v in state_dict.items() if k != key}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        whole = state_dict.get(key)
        missing_keys += [name for name in missing if name != key or whole is None]
        if whole is None:
            return
        if is_partitioned(self.trained) and whole.numel() == 0:
            # DeepSpeed's ZeRO-3 saves parameters' parts by itself, and places without entries here.
            return
        if whole.shape != self.whole_shape:
            error_msgs.append(f"{key}: {self._unfit(whole)}")
        elif local_metadata.get("assign_to_params_buffers", False):
            self.weight = nn.Parameter(whole, requires_grad=self.trained.requires_grad)
        else:
            self.write(whole)


def take_anchor(factor: nn.Module) -> None:
    """Turn an anchored factor back into PEFT's of rank ``r``, in place; any other stays as it is."""
    if isinstance(factor, AnchoredFactor):
        factor.__class__ = factor.plain  # type: ignore[assignment]
        for name in ("anchor", "experts", "is_copy"):
            delattr(factor, name)
        note_sizes(factor, factor.weight.shape)  # type: ignore[arg-type]


def note_sizes(factor: nn.Module, shape: torch.Size) -> None:
    """What a layer says of its own size."""
    names = ("out_features", "in_features")
    if not isinstance(factor, nn.Linear):
        names = ("out_channels", "in_channels")
    for name, size in zip(names, shape[:2], strict=True):
        setattr(factor, name, size)


def trained_of(factor: nn.Module) -> Tensor:
    """The half of a factor that is trained: its parameter, without its anchor if it has one."""
    return factor.trained if isinstance(factor, AnchoredFactor) else factor.weight  # type: ignore[return-value]
