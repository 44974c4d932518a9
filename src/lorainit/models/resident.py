"""Weights that wait on the host or on disk, kept where they are used for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Inside, accelerate's hooks leave the block's offloaded weights on their execution device.

    So they travel once, however often the block runs; without this, at every call of every layer.
    """
    with ExitStack() as stack:
        for module in block.modules():
            hook = getattr(module, "_hf_hook", None)
            if getattr(hook, "offload", False):
                stack.callback(_offload, module, hook)
                hook.pre_forward(module)  # type: ignore[union-attr]
                hook.offload = False  # type: ignore[union-attr]
        yield


def _offload(module: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(module, None)
