"""One layer's pair of factors: made ready aside, then put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredA, AnchoredB, placed_like, whole_of
from lorainit.adapters.stacks import in_peft, is_stack, stacked_a, stacked_b
from lorainit.types import Factors


def trained_of(factor: nn.Module) -> Tensor:
    """The half of a factor that is trained: its weight, beside its anchor if it has one."""
    return factor.trained if isinstance(factor, AnchoredA | AnchoredB) else factor.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class _Restart:
    """Both halves of an anchored pair whose parameters are sharded and stay where they are."""

    a: Tensor | None
    b: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None


_Pair = tuple[nn.Module, nn.Module] | tuple[Tensor, Tensor] | _Restart | None


def prepare_pair(
    layer: LoraLayer, adapter_name: str, pairs: Mapping[str, Factors], anchored: bool
) -> _Pair:
    """What a layer is to hold: new modules, or values for those it has, or None for no change."""
    old_a, old_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    like_a, like_b = trained_of(old_a), trained_of(old_b)
    pair: Factors | None
    start: Factors | None
    if pairs and is_stack(layer):
        pair, start = _filled(layer, like_a, like_b, pairs)
    else:
        pair = start = next(iter(pairs.values()), None)
    if anchored and hasattr(like_a, "device_mesh"):
        halves = (None, None) if pair is None else (pair.A, pair.B)
        kept = start is not None and start.anchored
        return _Restart(*halves, *((start.A, start.B) if kept and start else (None, None)))
    if pair is None:
        if like_a.is_meta:
            a, b = _default_start(like_a, like_b, layer)
        elif anchored or isinstance(old_a, AnchoredA):
            a, b = like_a.detach().clone(), like_b.detach().clone()
        else:
            return None
    else:
        a, b = _like(pair.A, like_a, layer), _like(pair.B, like_b, layer)
    bias = getattr(old_b, "bias", None)
    if bias is not None and bias.is_meta:
        bias = torch.zeros_like(bias, device=a.device)
    if anchored:
        experts = experts_of(layer)
        if start is None or not start.anchored:
            start_a, start_b = torch.zeros_like(a), torch.zeros_like(b)
        else:
            start_a, start_b = _like(start.A, a, layer), _like(start.B, b, layer)
        return (
            AnchoredA(a, start_a, experts=experts),
            AnchoredB(b, start_b, bias, experts=experts),
        )
    if isinstance(old_a, AnchoredA) or like_a.is_meta:
        return _linear(a, None), _linear(b, bias)
    return a, b


def _filled(
    layer: ParamWrapper, like_a: Tensor, like_b: Tensor, pairs: Mapping[str, Factors]
) -> tuple[Factors, Factors]:
    """All experts' factors in PEFT's layout, those without any at PEFT's start, and their anchors."""
    if like_a.is_meta:
        a, b = _default_start(like_a, like_b, layer)
    else:
        a, b = whole_of(like_a.detach()).clone(), whole_of(like_b.detach()).clone()
    start_a, start_b = torch.zeros_like(a), torch.zeros_like(b)
    for name, pair in pairs.items():
        index = int(name.rpartition(".")[2])
        new = in_peft(layer, pair.A, pair.B)
        for whole_a, whole_b in ((a, b), (start_a, start_b))[: 2 if pair.anchored else 1]:
            stacked_a(whole_a, layer.num_experts)[index] = new[0].to(a)
            stacked_b(whole_b, layer.num_experts)[index] = new[1].to(b)
    anchored = any(pair.anchored for pair in pairs.values())
    return Factors(a, b), Factors(start_a, start_b, anchored)


def filled_up(pair: Factors, rank: int) -> Factors:
    """Factors of a larger rank and the same product: further rows of ``A`` as PEFT draws them, ``B`` zero.

    Of an anchored pair the rows are in its anchor too.
    """
    own, columns = pair.A.shape
    rows = pair.A.new_empty(rank, columns)
    nn.init.kaiming_uniform_(rows, a=5**0.5)
    zeros = pair.B.new_zeros(pair.B.shape[0], rank - own)
    return Factors(
        torch.cat([pair.A, rows[own:]]), torch.cat([pair.B, zeros], dim=1), pair.anchored
    )


def experts_of(layer: LoraLayer) -> int:
    """Pairs in the layer's one: more than one in a stack of experts only."""
    return int(layer.num_experts) if is_stack(layer) else 1


def put_pair(layer: LoraLayer, adapter_name: str, pair: _Pair) -> None:
    """Give a layer what `prepare_pair` made for it."""
    if pair is None:
        return
    if isinstance(pair, _Restart):
        _restart(layer, adapter_name, pair)
        _refresh_magnitude(layer, adapter_name)
        return
    a, b = pair
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        swap_pair(layer, adapter_name, (a, b))
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        layer.lora_A[adapter_name].weight.copy_(a)
        layer.lora_B[adapter_name].weight.copy_(b)
    _refresh_magnitude(layer, adapter_name)


def _restart(layer: LoraLayer, adapter_name: str, pair: _Restart) -> None:
    for kind, holder, start, anchor in (
        (AnchoredA, layer.lora_A, pair.a, pair.start_a),
        (AnchoredB, layer.lora_B, pair.b, pair.start_b),
    ):
        factor = holder[adapter_name]
        if not isinstance(factor, AnchoredA | AnchoredB):
            factor = kind.around(factor, experts=experts_of(layer)).train(factor.training)
            holder[adapter_name] = factor
        like = factor.trained
        factor.restart(
            None if start is None else _like(start, like, layer),
            None if anchor is None else anchor.to(device=like.device, dtype=like.dtype),
        )


def swap_pair(layer: LoraLayer, adapter_name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """Replace the layer's factors, which keep their flags and mode."""
    for holder, new in zip((layer.lora_A, layer.lora_B), pair, strict=True):
        old = holder[adapter_name]
        trainable = trained_of(old).requires_grad
        holder[adapter_name] = new.requires_grad_(trainable).train(old.training)


def materialize(layer: LoraLayer, adapter_name: str) -> None:
    """PEFT's own start for factors on the meta device that no method serves."""
    if isinstance(layer, ParamWrapper) and layer.lora_A[adapter_name].weight.is_meta:
        old = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        a, b = _default_start(*old, layer)
        swap_pair(layer, adapter_name, (_linear(a, None), _linear(b, None)))
    if adapter_name not in layer.lora_embedding_A:
        return
    for holder in (layer.lora_embedding_A, layer.lora_embedding_B):
        old = holder[adapter_name]
        if old.is_meta:
            device = _base_device(layer)
            new = nn.Parameter(torch.zeros_like(old, device=device), old.requires_grad)
            holder[adapter_name] = new
            if holder is layer.lora_embedding_B:
                nn.init.normal_(new)


def _default_start(like_a: Tensor, like_b: Tensor, layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Kaiming A and zero B, as PEFT's ``init_lora_weights=True``."""
    device = _base_device(layer)
    a = torch.empty_like(like_a, device=device, requires_grad=False)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return a, torch.zeros_like(like_b, device=device, requires_grad=False)


def _like(value: Tensor, like: Tensor, layer: LoraLayer) -> Tensor:
    """The value in the dtype and on the device that PEFT chose; meta means the base layer's."""
    device = like.device
    if like.is_meta:
        device = _base_device(layer)
    return placed_like(value.detach().to(device=device, dtype=like.dtype), like)


def _base_device(layer: LoraLayer) -> torch.device:
    """Where the base layer's weight lies, whatever it is stored as, or is used, if offloaded."""
    base = layer.get_base_layer()
    for tensor in [*base.parameters(), *base.buffers()]:
        if not tensor.is_meta:
            return torch.device(tensor.device)
    place = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu" if place is None else place)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _refresh_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """DoRA's magnitude is the norm of the merged weight at the start: take it again."""
    if adapter_name not in layer.lora_magnitude_vector:
        return
    magnitude = layer.lora_magnitude_vector[adapter_name]
    flag = magnitude.weight.requires_grad
    magnitude.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[adapter_name].weight,
        lora_B=layer.lora_B[adapter_name].weight,
        scaling=layer.scaling[adapter_name],
    )
    magnitude.weight.requires_grad_(flag)
