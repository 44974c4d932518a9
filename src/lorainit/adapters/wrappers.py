"""Wrappers for many processes, and compiled models: seen through where that is right, else refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorainit.adapters.anchor import AnchoredFactor
from lorainit.adapters.targets import base_model_of
from lorainit.errors import AdapterError
from lorainit.parallel.partitioned import is_partitioned


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers and ``torch.compile``; a sharded model is as it is.

    Raises:
        AdapterError: DeepSpeed with an optimizer, FSDP1 or tensor parallelism, with the way round.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, DistributedDataParallel | DataParallel):
            inner = model.module
        if type(model).__name__ == "DeepSpeedEngine":
            inner = _of_engine(model)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    _refuse(model)
    return model


def _of_engine(engine: Any) -> nn.Module:
    """DeepSpeed's engine keeps copies of what it trains, which a start would not reach."""
    optimizer = engine.optimizer
    if optimizer is not None and hasattr(optimizer, "param_groups"):
        raise AdapterError(
            "the model is in a DeepSpeed engine that has an optimizer, which keeps copies of the parameters "
            "it trains. Start the adapter before deepspeed.initialize: a model that was loaded under "
            "deepspeed.zero.Init is read as it is, and an engine without optimizer is seen through."
        )
    module: nn.Module = engine.module
    return module


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise AdapterError(
                f"'{name or 'the model'}' is wrapped in FullyShardedDataParallel (FSDP1), which "
                "flattens its weights. Start the adapter before wrapping, or shard with FSDP2 "
                "(fully_shard; fsdp_version: 2 in accelerate's configuration)."
            )
    if _tensor_parallel(model):
        raise AdapterError(
            "the model's weights are split by tensor parallelism, where every process sees the same "
            "data. Load it without tp_plan: whole, with device_map='auto', or shard it with "
            "fully_shard."
        )


def _tensor_parallel(model: nn.Module) -> bool:
    """Whether any weight is split by a ``tp_plan``: a DTensor, or (transformers before) a part by itself."""
    if any(getattr(module, "_hf_tp_plan", None) for module in model.modules()):
        return True
    split = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return split and not _fully_sharded(model)


def _fully_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def adapter_parameters(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """An adapter's parameters that are there, in the modules' order."""
    named = base_model_of(model).named_parameters()
    return [p for name, p in named if f".{adapter_name}." in f".{name}." and "lora_" in name]


def adapter_tensors(model: nn.Module, adapter_name: str) -> list[torch.Tensor]:
    """All of an adapter's own tensors that every process holds whole, in the modules' order."""
    found = []
    base = base_model_of(model)
    anchors = [
        (f"{name}.anchor", module.anchor)
        for name, module in base.named_modules()
        if isinstance(module, AnchoredFactor)
    ]
    for name, tensor in [*base.named_parameters(), *base.named_buffers(), *anchors]:
        if f".{adapter_name}." not in f".{name}." or "lora_" not in name:
            continue
        if tensor.is_meta or hasattr(tensor, "device_mesh") or is_partitioned(tensor):
            continue
        found.append(tensor.data)
    return found
