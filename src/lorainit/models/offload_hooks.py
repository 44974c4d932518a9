"""accelerate's hooks on a module, which bring weights that wait on the host or on disk to their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """Every hook, those inside a ``SequentialHook`` (``add_hook_to_module(append=True)``) one by one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from _each(hook)


def _each(hook: Any) -> Iterator[Any]:
    inside = getattr(hook, "hooks", None)
    if inside is None:
        yield hook
        return
    for part in inside:
        yield from _each(part)


def stored_weights(module: nn.Module) -> Mapping[str, Tensor] | None:
    """The module's own weights where they wait, by name; None where no hook holds any."""
    maps = (getattr(hook, "weights_map", None) for hook in hooks_of(module))
    return next((found for found in maps if found is not None), None)
