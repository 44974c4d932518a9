"""Letting PEFT create an adapter's layers: at its own start, or empty where all of them are written."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorainit.adapters.layers import adapter_layers
from lorainit.adapters.targets import Targets
from lorainit.types import Factors

_HALVES = (torch.float16, torch.bfloat16)
# What changes neither which tensors an adapter has nor how PEFT starts them, beyond their shapes. Anything
# else that is set, also by a later PEFT, gets PEFT's ordinary way.
_SHAPES_ONLY = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "inference_mode", "task_type"),
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
}
# The wrappers of the others add heads to what is saved, whatever the configuration says.
_NO_HEADS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_DRAWN_AT_ONCE = 2**24


def create_adapter(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    targets: Targets,
    factors: Mapping[str, Factors],
    *,
    autocast: bool,
) -> PeftModel:
    """A PeftModel with a new adapter, which `install` is to write next.

    Where nothing of PEFT's own start would remain, it is left out: the memory of the factors is allocated
    and holds anything, and the random generators are where that start would have left them.

    Args:
        model: a base model or a PeftModel.
        config: of the adapter.
        adapter_name: of the adapter.
        targets: what the configuration matches.
        factors: what will be written, by target name.
        autocast: keep the adapters of half-precision layers in float32.
    """
    if isinstance(model, PeftModel):
        # PEFT before 0.19 always casts here, and has no such argument.
        casting = {} if autocast else {"autocast_adapter_dtype": False}
        model.add_adapter(adapter_name, config, **casting)
        return model
    how: dict[str, Any] = {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast}
    if not _nothing_remains(config, targets, factors):
        return peft.get_peft_model(model, config, **how)
    with ThreadPoolExecutor(1) as aside:
        # In C++, beside PEFT's Python.
        skipped = aside.submit(_skip_draws, sum(map(_draws, factors.values())))
        wrapped = peft.get_peft_model(model, config, **how, low_cpu_mem_usage=True)
        skipped.result()
    for name, layer in adapter_layers(wrapped, adapter_name).items():
        if name in factors:
            _allocate(layer, adapter_name, autocast)
    return wrapped


def _allocate(layer: LoraLayer, adapter_name: str, autocast: bool) -> None:
    """Factors of a plain layer, off the meta device to where PEFT puts them, in the dtype it gives them."""
    like = layer.get_base_layer().weight
    dtype = torch.float32 if autocast and like.dtype in _HALVES else like.dtype
    for holder in (layer.lora_A, layer.lora_B):
        holder[adapter_name].to(dtype).to_empty(device=like.device)


def _nothing_remains(config: LoraConfig, targets: Targets, factors: Mapping[str, Factors]) -> bool:
    """Whether factors replace all that PEFT would start, and what it would draw is known."""
    default = vars(LoraConfig())
    if any(
        key not in _SHAPES_ONLY and (key not in default or value != default[key])
        for key, value in vars(config).items()
    ):
        return False
    # Where PEFT would draw: a user may have set another default device or dtype.
    usual = torch.empty(0)
    return (
        config.task_type in _NO_HEADS
        and not targets.left_out
        and set(factors) == set(targets.layers)
        and all(_is_plain(target.module) for target in targets.layers.values())
        and (usual.device.type, usual.dtype) == ("cpu", torch.float32)
    )


def _is_plain(module: nn.Module) -> bool:
    """A linear layer with a weight of its own: not quantized, sharded, offloaded or parametrized."""
    if type(module) not in (nn.Linear, Conv1D):
        return False
    weight = module.weight
    return (
        type(weight) is nn.Parameter
        and not weight.is_meta
        and weight.dtype in (torch.float32, *_HALVES)
    )


def _draws(pair: Factors) -> int:
    """Numbers that PEFT draws for a layer: torch's own start of both factors, and again that of A."""
    return 2 * pair.A.numel() + pair.B.numel()


def _skip_draws(count: int) -> None:
    """Advance the CPU's generator by so many float32 numbers.

    A byte takes as much of the generator as such a number, and is made of it in less than half the time.
    """
    scratch = torch.empty(min(count, _DRAWN_AT_ONCE), dtype=torch.uint8, device="cpu")
    for begin in range(0, count, _DRAWN_AT_ONCE):
        scratch[: count - begin].random_()
