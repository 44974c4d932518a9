"""What a model says of itself: what is inside its wrappers, its encoder, its dtype and device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lorainit.models.experts import ExpertLayer
from lorainit.models.offload_hooks import hooks_of


def innermost_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers (PEFT, data parallel, compile), which know little of themselves."""
    while True:
        if callable(get := getattr(model, "get_base_model", None)):
            inner = get()
        else:
            inner = getattr(model, "_orig_mod", None)
            if inner is None and not hasattr(model, "config"):
                inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def input_device(model: nn.Module) -> torch.device:
    """Where the model wants its inputs: its embedding's device, or its first parameter's.

    Of weights that accelerate fetches when they are used it is where they are used.
    """
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        embedding = None
    for owner in (embedding, model):
        for part in owner.modules() if isinstance(owner, nn.Module) else ():
            place = execution_device(part)
            if place is not None:
                return place
            for parameter in part.parameters(recurse=False):
                if parameter.device.type != "meta":
                    return _where_it_runs(parameter)
    return torch.device("cpu")


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module, whose weights may wait elsewhere; None without a hook of its."""
    hooked = module.stack.owner if isinstance(module, ExpertLayer) else module
    places = (getattr(hook, "execution_device", None) for hook in hooks_of(hooked))
    place = next((found for found in places if found is not None), None)
    return None if place is None else torch.device(place)


def _where_it_runs(parameter: nn.Parameter) -> torch.device:
    """Weights may wait on the CPU for a device that they are copied to when they are used."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and mesh.device_type not in ("cpu", parameter.device.type):
        kind = str(mesh.device_type)
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return parameter.device


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers by itself: a whole one, an encoder, a vision tower."""
    return any(parent.__name__ == "PreTrainedModel" for parent in type(module).__mro__)


def is_part(module: nn.Module) -> bool:
    """Whether a module is a model by itself, or, as some encoders, is given token ids and their mask."""
    if is_transformers_model(module):
        return True
    names = argument_names(module)
    return "input_ids" in names and any(name.endswith("mask") for name in names)


def blocks_with_masks(model: nn.Module) -> Iterator[nn.Module]:
    """Blocks of layers that are given a mask, and what inside of them is given one."""
    seen: set[int] = set()
    for container in model.modules():
        for block in container if isinstance(container, nn.ModuleList) else ():
            for module in () if is_transformers_model(block) else block.modules():
                leaf = next(module.children(), None) is None
                if leaf or id(module) in seen or is_transformers_model(module):
                    continue
                if "attention_mask" in argument_names(module):
                    seen.add(id(module))
                    yield module


def argument_names(module: nn.Module) -> frozenset[str]:
    """Names of the arguments of a module's forward."""
    return _names(getattr(module.forward, "__func__", module.forward))


@lru_cache(maxsize=4096)
def _names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
