"""The LoRA layers of an adapter: which there are, and what each can take."""

from __future__ import annotations

import copy
from collections.abc import Collection

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from lorainit.adapters.anchor import AnchoredA
from lorainit.adapters.patterns import scale_ranks
from lorainit.adapters.stacks import is_stack
from lorainit.errors import AdapterError


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
    return isinstance(layer.lora_A[adapter_name], nn.Linear)


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
        full = name_in_patterns(name, layer)
        if name in served or (is_stack(layer) and full in stacks):
            continue
        if any(full == end or full.endswith("." + end) for end in said):
            continue
        kind = "a parameter of" if isinstance(layer, ParamWrapper) else "a"
        found[full] = f"{kind} {type(layer.get_base_layer()).__name__}, no linear layer"
    return found


def name_in_patterns(name: str, layer: LoraLayer) -> str:
    """The name by which PEFT looks a layer up in ``rank_pattern``."""
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"
