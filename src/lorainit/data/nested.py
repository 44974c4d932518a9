"""Tensors in whatever a batch is made of: dictionaries, lists, tuples, dataclasses, objects with ``to``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of `value` with its tensors on `device`; the value itself is not changed."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if type(value) is dict or (
        isinstance(value, Mapping) and not isinstance(value, MutableMapping)
    ):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, MutableMapping):
        moved = copy.copy(value)
        for key in value:
            moved[key] = to_device(value[key], device)
        return moved
    if is_dataclass(value) and not isinstance(value, type):
        shallow: Any = copy.copy(value)
        for field in fields(value):
            # The dataclass may be frozen.
            item = to_device(getattr(value, field.name), device)
            object.__setattr__(shallow, field.name, item)
        return shallow
    if callable(getattr(value, "to", None)):
        return copy.copy(value).to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        parts = list(value) if isinstance(value, list | tuple) else []
    for part in parts:
        yield from tensors_in(part)
