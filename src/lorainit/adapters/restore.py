"""An adapter that was there before keeps its values when starting it again fails half way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorainit.adapters.layers import configurations

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def restored_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """If the block fails, hooks of all modules are as before, and so is an adapter of this name.

    The adapter's factors are copied meanwhile, which takes its own size in memory.
    """
    hooks = [
        (table, dict(table))
        for module in model.modules()
        for name in _HOOKS
        if isinstance(table := getattr(module, name, None), dict)
    ]
    undo: list[Callable[[], None]] = []
    known = configurations(model)
    if adapter_name in known:
        undo.append(_entry(known, adapter_name))
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.r:
                undo += _layer(layer, adapter_name)
    try:
        yield
    except BaseException:
        for table, before in hooks:
            table.clear()
            table.update(before)
        for step in undo:
            step()
        raise


@contextlib.contextmanager
def displaced_base_restored_on_error(model: nn.Module, config: LoraConfig) -> Iterator[None]:
    """If the block fails, the weights are as before that PEFT changes when it loads such an adapter.

    PEFT's own PiSSA, OLoRA, CorDA, LoRA-GA and KaSA take their start out of the base weights when an adapter
    is created, loaded ones included. Only for those are the targets' weights copied meanwhile.
    """
    copies: list[tuple[nn.Parameter, torch.Tensor]] = []
    if isinstance(config.init_lora_weights, str) or getattr(config, "kasa_config", None):
        for name, module in model.named_modules():
            if check_target_module_exists(config, name):
                copies += [(p, p.detach().clone()) for p in module.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, copy in copies:
                if not torch.equal(parameter, copy):
                    parameter.data.copy_(copy)
        raise


def _layer(layer: nn.Module, adapter_name: str) -> list[Callable[[], None]]:
    """What puts back every table of the layer that knows the adapter: numbers and modules."""
    tables = [t for t in vars(layer).values() if isinstance(t, dict) and adapter_name in t]
    holders = [
        h for h in layer._modules.values() if isinstance(h, nn.ModuleDict | nn.ParameterDict)
    ]
    found = [_entry(table, adapter_name) for table in tables]
    for holder in holders:
        if adapter_name not in holder:
            continue
        found.append(_entry(holder, adapter_name))
        held = holder[adapter_name]
        if isinstance(held, nn.Module):
            found += [_module(part) for part in held.modules()]
        else:
            found.append(_tensor(held))
    return found


def _entry(table: Any, name: str) -> Callable[[], None]:
    value = table[name]

    def restore() -> None:
        if table[name] is not value:
            table[name] = value

    return restore


def _module(module: nn.Module) -> Callable[[], None]:
    kind = module.__class__
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    children = dict(module._modules)
    tensors = [_tensor(t) for t in [*parameters.values(), *buffers.values()] if t is not None]

    def restore() -> None:
        module.__class__ = kind
        for table, before in (
            (module._parameters, parameters),
            (module._buffers, buffers),
            (module._modules, children),
        ):
            table.clear()  # type: ignore[attr-defined, arg-type]
            table.update(before)  # type: ignore[attr-defined, arg-type]
        for step in tensors:
            step()

    return restore


def _tensor(tensor: torch.Tensor) -> Callable[[], None]:
    flag, data = tensor.requires_grad, tensor.data
    copy = None if tensor.is_meta else tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            tensor.data = data
            if copy is not None:
                tensor.copy_(copy)
        tensor.requires_grad_(flag)

    return restore
