"""The LoRA layers of an adapter: which there are, and what each can take."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredFactor, trained_of
from lorainit.adapters.patterns import scale_ranks
from lorainit.adapters.stacks import is_stack
from lorainit.errors import AdapterError
from lorainit.models.convolution import Convolution
from lorainit.models.reference_forward import reference_forward
from lorainit.models.undo import surely


def configurations(model: nn.Module) -> dict[str, LoraConfig]:
    """The configuration of every adapter in a model, by name.

    Args:
        model: a PeftModel; or any model whose adapters are its own (``inject_adapter_in_model``, or
            ``add_adapter`` of transformers, diffusers and sentence-transformers); or a base model.
    """
    found = getattr(model, "peft_config", None)
    if not isinstance(found, dict):
        return {}
    held = isinstance(model, PeftModel) or any(isinstance(m, LoraLayer) for m in model.modules())
    return found if held else {}


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute what the base model computes; every flag is as it was afterwards.

    PEFT's own context lets every active adapter learn afterwards, frozen before or not. A loss that switches
    adapters off, or another one on, for the forward pass of its reference finds them off and leaves them off;
    that pass is a `reference_forward`.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    layers = [
        m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    own = not isinstance(model, PeftModel)
    enabled = [m for m in layers if own and not m.disable_adapters]
    with ExitStack() as stack:
        stack.callback(surely, _enable, enabled, flags)
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
            stack.enter_context(_marked_references(model))
        for module in enabled:
            module.enable_adapters(False)
        yield


def _enable(modules: list[Any], flags: list[tuple[nn.Parameter, bool]]) -> None:
    for module in modules:
        module.enable_adapters(True)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextlib.contextmanager
def _marked_references(model: PeftModel) -> Iterator[None]:
    """While adapters are off: calls that switch them off, or to another one, begin a `reference_forward`."""
    policy = model.active_adapter
    marks = ExitStack()

    def set_adapter(adapter_name: str, *args: object, **kwargs: object) -> None:
        type(model).set_adapter(model, adapter_name, *args, **kwargs)
        marks.close()
        if adapter_name != policy:
            marks.enter_context(reference_forward())

    own = {"disable_adapter": reference_forward, "set_adapter": set_adapter}
    held = {name: vars(model)[name] for name in own if name in vars(model)}
    vars(model).update(own)
    try:
        yield
    finally:
        marks.close()
        for name in own:
            del vars(model)[name]
        vars(model).update(held)


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Every LoRA layer that has this adapter, by the base model's own module name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    }


def is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter adds a plain matrix pair here: a linear layer, or a convolution of one group.

    Of a convolution the pair is its kernel's, flattened.
    """
    if adapter_name not in layer.lora_A or isinstance(layer, ParamWrapper):
        return False
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(a, nn.Conv1d | nn.Conv2d):
        return Convolution.of(layer.get_base_layer()) is not None and b.groups == 1
    return isinstance(a, nn.Linear)


def takes_factors(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter of this layer can be started: `is_linear`, or a stack of experts."""
    if adapter_name not in layer.lora_A:
        return False
    return is_linear(layer, adapter_name) or is_stack(layer)


def matrices(layer: LoraLayer, adapter_name: str, *, trained: bool) -> tuple[Tensor, Tensor] | None:
    """``A`` ``(rank, in)`` and ``B`` ``(out, rank)``, detached; None where the adapter is no plain pair.

    Args:
        layer: a LoRA layer.
        adapter_name: of its adapter.
        trained: of an anchored pair the trained half alone.
    """
    if is_embedding(layer, adapter_name):
        pair = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    elif is_linear(layer, adapter_name):
        first, second = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        pair = first.weight, second.weight
        if trained:
            pair = trained_of(first), trained_of(second)
    else:
        return None
    a, b = (t.detach().flatten(1) for t in pair)
    return a, b


def is_embedding(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the adapter of this layer is a pair of an embedding's, which can be started without anchor."""
    return adapter_name in layer.lora_embedding_A


def is_anchored(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether this adapter of the layer carries an anchor."""
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], AnchoredFactor)


def true_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The adapter's configuration at the rank that is trained: an anchor's half taken out."""
    config: LoraConfig = copy.deepcopy(configurations(model)[adapter_name])
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
    model: nn.Module, adapter_name: str, served: Collection[str], said: Collection[str]
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
