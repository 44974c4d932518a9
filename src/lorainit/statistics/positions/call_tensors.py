"""Tensors of a call: its arguments by name, what it gave, and where their memory is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def tensor_pairs(
    batch: object, moved: object, key: str = ""
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Tensors of a batch and where they were moved to, also in dictionaries and lists, by key."""
    if isinstance(batch, Tensor) and isinstance(moved, Tensor):
        yield key, batch, moved
    elif isinstance(batch, Mapping) and isinstance(moved, Mapping):
        for name in batch:
            yield from tensor_pairs(batch[name], moved[name], str(name))
    elif isinstance(batch, list | tuple) and isinstance(moved, list | tuple):
        for one, other in zip(batch, moved, strict=True):
            yield from tensor_pairs(one, other, key)


def output_tensors(output: Any, depth: int = 2) -> Iterator[Tensor]:
    """Tensors of hidden states that a part gave, its main one first."""
    if isinstance(output, Tensor):
        if output.dim() >= 2 and output.is_floating_point():
            yield output
    elif depth and isinstance(output, Mapping | list | tuple):
        for entry in output.values() if isinstance(output, Mapping) else output:
            yield from output_tensors(entry, depth - 1)


def arguments_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, those of ``**kwargs`` too."""
    if not args:
        return kwargs
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except TypeError:
        return kwargs
    return {k: v for k, v in bound.arguments.items() if k not in ("args", "kwargs")} | kwargs


def address(tensor: Tensor) -> int:
    """Of the tensor's memory, which its views share."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        # Tensors of subclasses that hold others.
        return id(tensor)


def is_length_first(x: Tensor, rows: int, length: int) -> bool:
    """Whether an input is ``(length, rows, ...)``: by its shape, or as a view of what has the rows first."""
    if x.dim() != 3 or x.shape[1] != rows:
        return False
    if rows == 1:
        return x.shape[0] > 1
    return (x.shape[0] == length != rows) or x.stride(0) < x.stride(1)


def has_rows(x: Tensor, rows: int) -> bool:
    """Whether an input is ``(rows, positions, ...)``."""
    return x.dim() == 3 and x.shape[0] == rows


def entries(tensor: Tensor) -> tuple[object, ...]:
    """Which entries of which memory a tensor is: two rows of a batch are not the same."""
    try:
        place = tensor.data_ptr()
    except (NotImplementedError, RuntimeError):
        place = id(tensor)
    return place, tensor.shape, tensor.stride()


def same_memory(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same, or views of one."""
    return one is not None and other is not None and address(one) == address(other)
