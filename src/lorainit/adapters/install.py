"""Writing starting factors into a PeftModel's adapter, with or without an anchor."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lorainit.adapters.anchor import trained_of
from lorainit.adapters.anchored_kinds import anchor_whole, can_be_anchored
from lorainit.adapters.layers import (
    adapter_layers,
    check_not_merged,
    configurations,
    is_anchored,
    is_embedding,
    name_in_patterns,
    takes_factors,
)
from lorainit.adapters.origin import Origin, remember
from lorainit.adapters.pairs import (
    experts_of,
    filled_up,
    materialize,
    prepare_pair,
    put_embedding,
    put_pair,
)
from lorainit.adapters.patterns import scale_ranks, scaled, spell_out
from lorainit.adapters.stacks import in_peft, is_stack, stacked_a, stacked_b
from lorainit.adapters.tuner import know_anchors
from lorainit.errors import AdapterError
from lorainit.types import Factors


@contextlib.contextmanager
def undone_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take back an adapter that could not be created or written: layers, flags and names as before.

    An adapter of this name that was there already stays.
    """
    known = set(model.peft_config) if isinstance(model, PeftModel) else set()
    attributes = set(vars(model))
    flags = [(p, p.requires_grad) for p in model.parameters()]
    children = [(m, dict(m._modules)) for m in model.modules()]
    try:
        yield
    except BaseException:
        if isinstance(model, PeftModel) and adapter_name in set(model.peft_config) - known:
            model.delete_adapter(adapter_name)
        if adapter_name not in known:
            for module, before in children:
                module._modules.clear()
                module._modules.update(before)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def install(
    model: nn.Module,
    adapter_name: str,
    factors: Mapping[str, Factors],
    settings: Mapping[str, Any] | None = None,
    measured: Mapping[str, float] | None = None,
    small: Collection[str] = (),
    heads: Mapping[str, Any] | None = None,
) -> None:
    """Write factors into an adapter whose layers PEFT has created.

    Everything is checked and allocated before the first layer is written.

    Args:
        model: holds the adapter `adapter_name`.
        adapter_name: of the adapter to write.
        factors: by the base model's module names, of experts by their parameter's name and their
            number. Layers and experts without factors keep PEFT's start; if any factors are
            anchored, they get an anchor of zeros, so that all layers have one rank.
        settings: what found the factors, for the record; JSON-ready.
        measured: losses before and after, where they were measured; for the record too.
        small: names of layers whose factors have a lower rank than the adapter, and are filled up.
        heads: what was fitted beside the adapter; for the record too.

    Raises:
        AdapterError: factors for a layer that the adapter does not have, or of another shape.
    """
    check_not_merged(model)
    layers = adapter_layers(model, adapter_name)
    given = _by_layer(layers, factors)
    missing = set(factors).difference(*(pairs for pairs in given.values()))
    if missing:
        raise AdapterError(
            f"adapter '{adapter_name}' has no layer '{min(missing)}' ({len(missing)} in all): its "
            "configuration matches other modules than the one that the factors were made with."
        )
    for place, pairs in given.items():
        layer = layers[place]
        for name in [name for name in pairs if name in small]:
            if is_embedding(layer, adapter_name):
                pairs[name] = filled_up(pairs[name], layer.r[adapter_name])
                continue
            rank = trained_of(layer.lora_A[adapter_name]).shape[0] // experts_of(layer)
            pairs[name] = filled_up(pairs[name], rank)
        for name, pair in pairs.items():
            _check_shapes(name, layers[place], adapter_name, pair)
    was_anchored = any(is_anchored(layer, adapter_name) for layer in layers.values())
    anchored = any(pair.anchored for pair in factors.values())
    odd = _odd_factor(layers, adapter_name)
    if odd is not None and was_anchored:
        # It cannot become plain again: an anchor of zeros takes nothing away.
        anchored = True
    elif odd is not None and anchored:
        raise AdapterError(odd)
    with torch.no_grad():
        prepared = {
            name: prepare_pair(layer, adapter_name, given[name], anchored)
            for name, layer in layers.items()
            if takes_factors(layer, adapter_name)
        }
        # The object may be the user's own.
        known = configurations(model)
        known[adapter_name] = copy.deepcopy(known[adapter_name])
        for name, held in prepared.items():
            put_pair(layers[name], adapter_name, held)
        for name, layer in layers.items():
            if name not in prepared:
                materialize(layer, adapter_name)
            if is_embedding(layer, adapter_name) and given[name]:
                put_embedding(layer, adapter_name, given[name][name])
    if was_anchored != anchored:
        _set_rank_scale(known[adapter_name], layers, adapter_name, 2.0 if anchored else 0.5)
    origin = Origin(
        anchored, dict(settings or {}), measured=dict(measured or {}), heads=dict(heads or {})
    )
    remember(model, adapter_name, origin)
    if anchored:
        know_anchors(model)


def _by_layer(
    layers: Mapping[str, LoraLayer], factors: Mapping[str, Factors]
) -> dict[str, dict[str, Factors]]:
    """Which factors each layer of the adapter gets, by their own names: one pair, or one an expert."""
    found: dict[str, dict[str, Factors]] = {}
    for name, layer in layers.items():
        own = [name]
        if is_stack(layer):
            stem = name_in_patterns(name, layer)
            own = [f"{stem}.{index}" for index in range(layer.num_experts)]
        found[name] = {key: factors[key] for key in own if key in factors}
    return found


def _odd_factor(layers: Mapping[str, LoraLayer], adapter_name: str) -> str | None:
    """Why some factor can get no anchor, nor lose it: something has given it a class of its own."""
    for name, layer in layers.items():
        if not takes_factors(layer, adapter_name):
            continue
        for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if hasattr(factor, "unshard"):
                return (
                    f"layer '{name}': fully_shard was applied to the adapter's factor by itself, which "
                    "cannot get an anchor then. Apply it to the whole block, or start the adapter "
                    "first and apply it afterwards; a method without an anchor can start it either way."
                )
            if not can_be_anchored(factor):
                return (
                    f"layer '{name}': the adapter's factor is a {type(factor).__name__}, not the nn.Linear "
                    "that an anchor can be given to. Use a method without one, such as lorainit.EVA()."
                )
    return None


def anchor_loaded(model: PeftModel, adapter_name: str) -> None:
    """Turn an adapter that was loaded as rank ``2r`` back into an anchored one of rank ``r``.

    Raises:
        AdapterError: a factor of odd rank: it was not saved from an anchored adapter.
    """
    layers = {
        name: layer
        for name, layer in adapter_layers(model, adapter_name).items()
        if takes_factors(layer, adapter_name) and not is_anchored(layer, adapter_name)
    }
    for name, layer in layers.items():
        if layer.r[adapter_name] % 2:
            raise AdapterError(
                f"layer '{name}' has rank {layer.r[adapter_name]}: an anchored adapter is saved "
                "with twice "
                "its rank, so this one was not anchored. Load it with anchored=False."
            )
    for layer in layers.values():
        experts = experts_of(layer)
        anchor_whole(layer.lora_A[adapter_name], "A", experts=experts)
        anchor_whole(layer.lora_B[adapter_name], "B", experts=experts)
    know_anchors(model)


def _check_shapes(name: str, layer: LoraLayer, adapter_name: str, pair: Factors) -> None:
    embedding = is_embedding(layer, adapter_name)
    if not takes_factors(layer, adapter_name) and not (embedding and not pair.anchored):
        raise AdapterError(
            f"layer '{name}' ({type(layer).__name__}) takes no factors: it is no linear layer."
        )
    if embedding:
        a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    else:
        a, b = trained_of(layer.lora_A[adapter_name]), trained_of(layer.lora_B[adapter_name])
    given = tuple(pair.A.shape), tuple(pair.B.shape)
    if is_stack(layer):
        # Shapes alone: what is sharded cannot always be viewed.
        a, b = (torch.empty(tuple(t.shape), device="meta") for t in (a, b))
        a, b = stacked_a(a, layer.num_experts)[0], stacked_b(b, layer.num_experts)[0]
        a, b = in_peft(layer, a, b)
    else:
        # Of a convolution the kernel is flattened.
        a, b = (torch.empty(t.shape[0], math.prod(t.shape[1:]), device="meta") for t in (a, b))
    have = tuple(a.shape), tuple(b.shape)
    if have != given:
        raise AdapterError(
            f"layer '{name}': the adapter has A, B of shapes {have}, the factors {given}. Give the "
            "configuration that the factors were made with."
        )


def _set_rank_scale(
    config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str, factor: float
) -> None:
    """Tell PEFT the rank it sees, with every scaling as it was; other kinds of layers stay."""
    alpha_factor = factor**0.5 if config.use_rslora else factor
    for layer in layers.values():
        if takes_factors(layer, adapter_name):
            layer.r[adapter_name] = round(layer.r[adapter_name] * factor)
            layer.lora_alpha[adapter_name] = scaled(layer.lora_alpha[adapter_name], alpha_factor)
    scale_ranks(config, factor)
    if not all(takes_factors(layer, adapter_name) for layer in layers.values()):
        spell_out(
            config,
            {
                name_in_patterns(name, layer): (
                    layer.r[adapter_name],
                    layer.lora_alpha[adapter_name],
                )
                for name, layer in layers.items()
            },
        )
