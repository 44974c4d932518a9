"""One layer's pair of factors: made ready aside, then put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lorainit.adapters.anchor import (
    placed_like,
    take_anchor,
    trained_of,
    whole_of,
)
from lorainit.adapters.anchored_kinds import Side, give_anchor
from lorainit.adapters.stacks import in_peft, is_stack, stacked_a, stacked_b
from lorainit.models.introspection import execution_device
from lorainit.types import Factors


@dataclass(frozen=True)
class PairValues:
    """What one layer's factors are to hold, in their dtype and on their device.

    Attributes:
        a: for the trained half of ``A``; None leaves it as it is.
        b: for that of ``B``.
        start_a: ``A0``; None for no anchor.
        start_b: ``-B0``.
        bias: for the bias of ``B``, where that is on the meta device.
    """

    a: Tensor | None
    b: Tensor | None
    start_a: Tensor | None = None
    start_b: Tensor | None = None
    bias: Tensor | None = None


def prepare_pair(
    layer: LoraLayer, adapter_name: str, pairs: Mapping[str, Factors], anchored: bool
) -> PairValues:
    """What a layer is to hold, allocated; the layer is not changed."""
    like_a = trained_of(layer.lora_A[adapter_name])
    like_b = trained_of(layer.lora_B[adapter_name])
    pair: Factors | None
    start: Factors | None
    if pairs and is_stack(layer):
        pair, start = _filled(layer, like_a, like_b, pairs)
    else:
        pair = start = next(iter(pairs.values()), None)
    a: Tensor | None = None
    b: Tensor | None = None
    if pair is not None:
        a, b = _like(pair.A, like_a, layer), _like(pair.B, like_b, layer)
    elif like_a.is_meta:
        a, b = _default_start(like_a, like_b, layer)
    bias = getattr(layer.lora_B[adapter_name], "bias", None)
    if bias is not None and bias.is_meta:
        bias = torch.zeros_like(bias, device=_base_device(layer))
    else:
        bias = None
    if not anchored:
        return PairValues(a, b, bias=bias)
    if start is not None and start.anchored:
        start_a, start_b = _like(start.A, like_a, layer), -_like(start.B, like_b, layer)
    else:
        start_a, start_b = (
            torch.zeros(tuple(like.shape), dtype=like.dtype, device=_device_of(like, layer))
            for like in (like_a, like_b)
        )
    layout = torch.contiguous_format
    start_a, start_b = (t.detach().clone(memory_format=layout) for t in (start_a, start_b))
    return PairValues(a, b, start_a, start_b, bias)


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


def put_pair(layer: LoraLayer, adapter_name: str, values: PairValues) -> None:
    """Write what `prepare_pair` made into the layer's own parameters, which optimizers may hold."""
    sides: tuple[Side, Side] = ("A", "B")
    factors = (layer.lora_A[adapter_name], layer.lora_B[adapter_name])
    given = ((values.a, values.start_a), (values.b, values.start_b))
    for side, factor, (value, start) in zip(sides, factors, given, strict=True):
        _write_trained(factor, value)
        if start is None:
            take_anchor(factor)
        else:
            give_anchor(factor, side, start, experts=experts_of(layer))
    if values.bias is not None:
        old = factors[1].bias
        factors[1].bias = nn.Parameter(values.bias, requires_grad=old.requires_grad)
    _refresh_magnitude(layer, adapter_name)


def put_embedding(layer: LoraLayer, adapter_name: str, pair: Factors) -> None:
    """Write a pair into an embedding's own parameters: ``A`` ``(rank, words)``, ``B`` ``(out, rank)``."""
    for holder, value in ((layer.lora_embedding_A, pair.A), (layer.lora_embedding_B, pair.B)):
        held = holder[adapter_name]
        held.copy_(placed_like(_like(value, held, layer), held))
    _refresh_magnitude(layer, adapter_name)


def _write_trained(factor: nn.Module, value: Tensor | None) -> None:
    if value is None:
        return
    held = trained_of(factor)
    if held.is_meta:
        value = value.detach().clone(memory_format=torch.contiguous_format)
        factor.weight = nn.Parameter(value, requires_grad=held.requires_grad)
    else:
        held.copy_(placed_like(value, held))


def materialize(layer: LoraLayer, adapter_name: str) -> None:
    """PEFT's own start for factors on the meta device that no method serves."""
    if isinstance(layer, ParamWrapper) and layer.lora_A[adapter_name].weight.is_meta:
        old = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        put_pair(layer, adapter_name, PairValues(*_default_start(*old, layer)))
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
    """The value, whole, as PEFT has it: its shape, dtype and device; meta means the base layer's."""
    moved = whole_of(value.detach()).to(device=_device_of(like, layer), dtype=like.dtype)
    return moved.reshape(like.shape)


def _device_of(like: Tensor, layer: LoraLayer) -> torch.device:
    return _base_device(layer) if like.is_meta else like.device


def _base_device(layer: LoraLayer) -> torch.device:
    """Where the base layer's weight lies, whatever it is stored as, or is used, if offloaded."""
    base = layer.get_base_layer()
    for tensor in [*base.parameters(), *base.buffers()]:
        if not tensor.is_meta:
            return torch.device(tensor.device)
    return execution_device(base) or torch.device("cpu")


def _refresh_magnitude(layer: LoraLayer, adapter_name: str) -> None:
    """DoRA's magnitude is the norm of the merged weight at the start: take it again."""
    if adapter_name not in layer.lora_magnitude_vector:
        return
    magnitude = layer.lora_magnitude_vector[adapter_name]
    flag = magnitude.weight.requires_grad
    if adapter_name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    magnitude.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=a,
        lora_B=b,
        scaling=layer.scaling[adapter_name],
    )
    magnitude.weight.requires_grad_(flag)
