"""Writing starting factors into a PeftModel's adapter, with or without an anchor."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredA, AnchoredB, placed_like, whole_of
from lorainit.adapters.origin import Origin, remember
from lorainit.adapters.patterns import scale_ranks, scaled, spell_out
from lorainit.adapters.stacks import in_peft, is_stack, stacked_a, stacked_b
from lorainit.errors import AdapterError
from lorainit.types import Factors


def adapter_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Every LoRA layer that has this adapter, by the base model's own module name."""
    return {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter adds a plain matrix pair here: no embedding, convolution or experts."""
    if adapter_name not in layer.lora_A or isinstance(layer, ParamWrapper):
        return False
    return isinstance(layer.lora_A[adapter_name], nn.Linear | AnchoredA)


def takes_factors(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter of this layer can be started: a linear layer, or a stack of experts."""
    if adapter_name not in layer.lora_A:
        return False
    return is_linear(layer, adapter_name) or is_stack(layer)


def is_anchored(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether this adapter of the layer carries an anchor."""
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], AnchoredA)


def true_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    """The adapter's configuration at the rank that is trained: an anchor's half taken out."""
    config: LoraConfig = copy.deepcopy(model.peft_config[adapter_name])
    if any(
        is_anchored(layer, adapter_name) for layer in adapter_layers(model, adapter_name).values()
    ):
        scale_ranks(config, 0.5)
    return config


def check_not_merged(model: nn.Module) -> None:
    """Refuse a model whose base holds a merged adapter: its weights are not the base's own.

    Raises:
        AdapterError: some adapter is merged.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.merged:
            raise AdapterError(
                f"adapter '{module.merged_adapters[0]}' is merged into layer '{name}', so the "
                "base weights "
                "are not the base model's: call model.unmerge_adapter() first."
            )


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
    model: PeftModel,
    adapter_name: str,
    factors: Mapping[str, Factors],
    settings: Mapping[str, Any] | None = None,
    measured: Mapping[str, float] | None = None,
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
        for name, pair in pairs.items():
            _check_shapes(name, layers[place], adapter_name, pair)
    was_anchored = any(is_anchored(layer, adapter_name) for layer in layers.values())
    anchored = any(pair.anchored for pair in factors.values())
    if was_anchored and _is_sharded(layers, adapter_name):
        # Its parameters stay where their sharding knows them: an anchor of zeros takes nothing away.
        anchored = True
    if anchored:
        _refuse_sharded_factors(layers, adapter_name)
    with torch.no_grad():
        prepared = {
            name: _prepare(layer, adapter_name, given[name], anchored)
            for name, layer in layers.items()
            if takes_factors(layer, adapter_name)
        }
        # The object may be the user's own.
        model.peft_config[adapter_name] = copy.deepcopy(model.peft_config[adapter_name])
        for name, held in prepared.items():
            _put(layers[name], adapter_name, held)
        for name, layer in layers.items():
            if name not in prepared:
                _materialize(layer, adapter_name)
    if was_anchored != anchored:
        _set_rank_scale(
            model.peft_config[adapter_name], layers, adapter_name, 2.0 if anchored else 0.5
        )
    origin = Origin(anchored, dict(settings or {}), measured=dict(measured or {}))
    remember(model, adapter_name, origin)


def _by_layer(
    layers: Mapping[str, LoraLayer], factors: Mapping[str, Factors]
) -> dict[str, dict[str, Factors]]:
    """Which factors each layer of the adapter gets, by their own names: one pair, or one an expert."""
    found: dict[str, dict[str, Factors]] = {}
    for name, layer in layers.items():
        own = [name]
        if is_stack(layer):
            stem = _name_in_patterns(name, layer)
            own = [f"{stem}.{index}" for index in range(layer.num_experts)]
        found[name] = {key: factors[key] for key in own if key in factors}
    return found


def _is_sharded(layers: Mapping[str, LoraLayer], adapter_name: str) -> bool:
    return any(
        hasattr(_trained(layer.lora_A[adapter_name]), "device_mesh")
        for layer in layers.values()
        if takes_factors(layer, adapter_name)
    )


def _refuse_sharded_factors(layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    """A factor that is a sharded unit by itself gathers its weight in its own forward alone."""
    for name, layer in layers.items():
        if not takes_factors(layer, adapter_name):
            continue
        for factor in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]):
            if hasattr(factor, "unshard") and not isinstance(factor, AnchoredA | AnchoredB):
                raise AdapterError(
                    f"layer '{name}': fully_shard was applied to the adapter's factor by itself, which "
                    "cannot get an anchor then. Apply it to the whole block, or start the adapter "
                    "first and apply it afterwards; a method without an anchor can start it either way."
                )


def left_at_default(
    model: PeftModel, adapter_name: str, served: Collection[str], said: Collection[str]
) -> dict[str, str]:
    """Layers of the adapter that PEFT made beyond the targets, with the reason, for the user.

    PEFT turns names of fused experts and routers into parameters that it adapts on its own.

    Args:
        model: holds the adapter.
        adapter_name: of the adapter.
        served: names of the layers that were written.
        said: names, or their ends, that are known to be left out already.
    """
    found = {}
    stacks = {name.rpartition(".")[0] for name in served}
    for name, layer in adapter_layers(model, adapter_name).items():
        full = _name_in_patterns(name, layer)
        if name in served or (is_stack(layer) and full in stacks):
            continue
        if any(full == end or full.endswith("." + end) for end in said):
            continue
        kind = "a parameter of" if isinstance(layer, ParamWrapper) else "a"
        found[full] = f"{kind} {type(layer.get_base_layer()).__name__}, no linear layer"
    return found


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
    with torch.no_grad():
        for layer in layers.values():
            old_a, old_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            experts = _experts(layer)
            pair = (
                AnchoredA.of_whole(old_a.weight.detach(), experts=experts),
                AnchoredB.of_whole(old_b.weight.detach(), old_b.bias, experts=experts),
            )
            _swap(layer, adapter_name, pair)


def _check_shapes(name: str, layer: LoraLayer, adapter_name: str, pair: Factors) -> None:
    if not takes_factors(layer, adapter_name):
        raise AdapterError(
            f"layer '{name}' ({type(layer).__name__}) takes no factors: it is no linear layer."
        )
    a, b = _trained(layer.lora_A[adapter_name]), _trained(layer.lora_B[adapter_name])
    given = tuple(pair.A.shape), tuple(pair.B.shape)
    if is_stack(layer):
        # Shapes alone: what is sharded cannot always be viewed.
        a, b = (torch.empty(tuple(t.shape), device="meta") for t in (a, b))
        a, b = stacked_a(a, layer.num_experts)[0], stacked_b(b, layer.num_experts)[0]
        a, b = in_peft(layer, a, b)
    have = tuple(a.shape), tuple(b.shape)
    if have != given:
        raise AdapterError(
            f"layer '{name}': the adapter has A, B of shapes {have}, the factors {given}. Give the "
            "configuration that the factors were made with."
        )


def _trained(factor: nn.Module) -> Tensor:
    return factor.trained if isinstance(factor, AnchoredA | AnchoredB) else factor.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class _Restart:
    """Both halves of an anchored pair whose parameters are sharded and stay where they are."""

    a: Tensor | None
    b: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None


_Pair = tuple[nn.Module, nn.Module] | tuple[Tensor, Tensor] | _Restart | None


def _prepare(
    layer: LoraLayer, adapter_name: str, pairs: Mapping[str, Factors], anchored: bool
) -> _Pair:
    """What a layer is to hold: new modules, or values for those it has, or None for no change."""
    old_a, old_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    like_a, like_b = _trained(old_a), _trained(old_b)
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
        experts = _experts(layer)
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


def _experts(layer: LoraLayer) -> int:
    """Pairs in the layer's one: more than one in a stack of experts only."""
    return int(layer.num_experts) if is_stack(layer) else 1


def _put(layer: LoraLayer, adapter_name: str, pair: _Pair) -> None:
    if pair is None:
        return
    if isinstance(pair, _Restart):
        _restart(layer, adapter_name, pair)
        _refresh_magnitude(layer, adapter_name)
        return
    a, b = pair
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        _swap(layer, adapter_name, (a, b))
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
            factor = kind.around(factor, experts=_experts(layer)).train(factor.training)
            holder[adapter_name] = factor
        like = factor.trained
        factor.restart(
            None if start is None else _like(start, like, layer),
            None if anchor is None else anchor.to(device=like.device, dtype=like.dtype),
        )


def _swap(layer: LoraLayer, adapter_name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    """Replace the layer's factors, which keep their flags and mode."""
    for holder, new in zip((layer.lora_A, layer.lora_B), pair, strict=True):
        old = holder[adapter_name]
        trainable = _trained(old).requires_grad
        holder[adapter_name] = new.requires_grad_(trainable).train(old.training)


def _materialize(layer: LoraLayer, adapter_name: str) -> None:
    """PEFT's own start for factors on the meta device that no method serves."""
    if isinstance(layer, ParamWrapper) and layer.lora_A[adapter_name].weight.is_meta:
        old = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        a, b = _default_start(*old, layer)
        _swap(layer, adapter_name, (_linear(a, None), _linear(b, None)))
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
                _name_in_patterns(name, layer): (
                    layer.r[adapter_name],
                    layer.lora_alpha[adapter_name],
                )
                for name, layer in layers.items()
            },
        )


def _name_in_patterns(name: str, layer: LoraLayer) -> str:
    """The name by which PEFT looks a layer up in ``rank_pattern``."""
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"
