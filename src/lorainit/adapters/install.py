"""Writing starting factors into a PeftModel's adapter, with or without an anchor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredA, AnchoredB
from lorainit.adapters.patterns import pin_layer, scale_ranks
from lorainit.errors import AdapterError
from lorainit.types import Factors


def adapter_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Every LoRA layer that has this adapter, by the base model's own module name."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def is_anchored(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether this adapter of the layer carries an anchor."""
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], AnchoredA)


def true_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    """The adapter's configuration at the rank that is trained: an anchor's half taken out."""
    import copy

    config: LoraConfig = copy.deepcopy(model.peft_config[adapter_name])
    if any(is_anchored(layer, adapter_name) for layer in adapter_layers(model, adapter_name).values()):
        scale_ranks(config, 0.5)
    return config


def install(model: PeftModel, adapter_name: str, factors: Mapping[str, Factors]) -> None:
    """Write factors into an adapter whose layers PEFT has created.

    Args:
        model: holds the adapter `adapter_name`.
        adapter_name: of the adapter to write.
        factors: by the base model's module names. Layers without factors keep PEFT's start; if any
            factors are anchored, they get an anchor of zeros, so that all layers have one rank.

    Raises:
        AdapterError: factors for a layer that the adapter does not have, or of another shape.
    """
    layers = adapter_layers(model, adapter_name)
    missing = [name for name in factors if name not in layers]
    if missing:
        raise AdapterError(
            f"adapter '{adapter_name}' has no layer '{missing[0]}' ({len(missing)} in all): its "
            "configuration matches other modules than the one that the factors were made with."
        )
    for name, pair in factors.items():
        _check_shapes(name, layers[name], adapter_name, pair)
    was_anchored = any(is_anchored(layer, adapter_name) for layer in layers.values())
    anchored = any(pair.anchored for pair in factors.values())
    with torch.no_grad():
        for name, layer in layers.items():
            if adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name].weight, Tensor):
                _write(layer, adapter_name, factors.get(name), anchored)
    config = model.peft_config[adapter_name]
    if was_anchored and not anchored:
        _set_rank_scale(config, layers, adapter_name, 0.5)
    elif anchored and not was_anchored:
        _set_rank_scale(config, layers, adapter_name, 2.0)


def _check_shapes(name: str, layer: LoraLayer, adapter_name: str, pair: Factors) -> None:
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    have = tuple(_trained(a).shape), tuple(_trained(b).shape)
    given = tuple(pair.A.shape), tuple(pair.B.shape)
    if have != given:
        raise AdapterError(
            f"layer '{name}': the adapter has A, B of shapes {have}, the factors {given}. Give the "
            "configuration that the factors were made with."
        )


def _trained(factor: nn.Module) -> Tensor:
    return factor.trained if isinstance(factor, AnchoredA | AnchoredB) else factor.weight  # type: ignore[return-value]


def _write(layer: LoraLayer, adapter_name: str, pair: Factors | None, anchored: bool) -> None:
    """One layer: plain modules or anchored ones, holding the pair or what was there."""
    old_a, old_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    like_a, like_b = _trained(old_a), _trained(old_b)
    if pair is None:
        if not anchored and not isinstance(old_a, AnchoredA):
            return
        a, b = like_a.detach().clone(), like_b.detach().clone()
    else:
        a, b = _like(pair.A, like_a, layer), _like(pair.B, like_b, layer)
    bias = getattr(old_b, "bias", None)
    trainable = like_a.requires_grad
    if anchored:
        keep = pair is not None and pair.anchored
        new_a: nn.Module = AnchoredA(a, a if keep else torch.zeros_like(a))
        new_b: nn.Module = AnchoredB(b, b if keep else torch.zeros_like(b), bias)
    elif isinstance(old_a, AnchoredA) or like_a.is_meta:
        new_a, new_b = _linear(a, None), _linear(b, bias)
    else:
        like_a.copy_(a)
        like_b.copy_(b)
        new_a, new_b = old_a, old_b
    if new_a is not old_a:
        layer.lora_A[adapter_name] = new_a.requires_grad_(trainable).train(old_a.training)
        layer.lora_B[adapter_name] = new_b.requires_grad_(trainable).train(old_b.training)
    _refresh_magnitude(layer, adapter_name)


def _like(value: Tensor, like: Tensor, layer: LoraLayer) -> Tensor:
    """The value in the dtype and on the device that PEFT chose; the base layer's where that is meta."""
    device = like.device
    if like.is_meta:
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    return value.detach().to(device=device, dtype=like.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone())
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


def _set_rank_scale(
    config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str, factor: float
) -> None:
    """Tell PEFT the rank it sees, with every scaling as it was; layers without factors stay."""
    plain = {
        name: (layer.r[adapter_name], layer.lora_alpha[adapter_name])
        for name, layer in layers.items()
        if adapter_name not in layer.lora_A
    }
    scale_ranks(config, factor)
    for name, (rank, alpha) in plain.items():
        pin_layer(config, name, rank, alpha)
    alpha_factor = factor**0.5 if config.use_rslora else factor
    for name, layer in layers.items():
        if name not in plain:
            layer.r[adapter_name] = round(layer.r[adapter_name] * factor)
            layer.lora_alpha[adapter_name] *= alpha_factor
