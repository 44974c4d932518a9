"""Weights that wait on the host or on disk (offloading): how often they travel, what stays of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.models.offload_hooks import hooks_of


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Inside, accelerate's hooks leave the block's offloaded weights on their execution device.

    So they travel once, however often the block runs; without this, at every call of every layer.
    """
    with ExitStack() as stack:
        for module, hook in offloading(block):
            stack.callback(_offload, module, hook)
            hook.pre_forward(module)
            hook.offload = False
        yield


def _offload(module: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(module, None)


@contextmanager
def fetched_again(model: nn.Module) -> Iterator[None]:
    """Inside, a graph keeps no copy of an offloaded weight on the device: its backward fetches it once more.

    Without this every weight that a forward pass has fetched stays until the backward: the whole model.
    """
    hooks = list(offloading(model))
    if not hooks:
        yield
        return
    fetched: dict[int, tuple[Any, str]] = {}

    def pack(tensor: Tensor) -> Tensor | _Fetched:
        hook = None
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
            hook, name = fetched.get(tensor.untyped_storage().data_ptr(), (None, ""))
        if hook is None or not hook.offload:
            # An operation's own result, kept as it is, would keep itself alive.
            return tensor.detach()
        return _Fetched(
            hook.weights_map, name, tensor.device, tensor.dtype,
            tensor.size(), tensor.stride(), int(tensor.storage_offset()),
        )  # fmt: skip

    with ExitStack() as stack:
        for _, hook in hooks:
            _note_fetches(hook, fetched, stack)
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(
                pack, lambda kept: kept.again() if isinstance(kept, _Fetched) else kept
            )
        )
        yield


@dataclass(frozen=True, eq=False)
class _Fetched:
    """A view of a weight, and where the weight waits."""

    weights: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def again(self) -> Tensor:
        whole: Tensor = self.weights[self.name].to(self.device, self.dtype)
        return whole.as_strided(self.size, self.stride, self.offset)


def _note_fetches(hook: Any, fetched: dict[int, tuple[Any, str]], stack: ExitStack) -> None:
    """Keep in `fetched` which storages hold this hook's weights, from their arrival to their leaving."""
    before, after = hook.pre_forward, hook.post_forward

    def arrive(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = before(module, *args, **kwargs)
        for name, weight in module.named_parameters(recurse=hook.place_submodules):
            fetched[weight.untyped_storage().data_ptr()] = hook, name
        return result

    def leave(module: nn.Module, output: Any) -> Any:
        for weight in module.parameters(recurse=hook.place_submodules):
            fetched.pop(weight.untyped_storage().data_ptr(), None)
        return after(module, output)

    hook.pre_forward, hook.post_forward = arrive, leave
    stack.callback(vars(hook).pop, "pre_forward")
    stack.callback(vars(hook).pop, "post_forward")


def offloaded_bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes of a module's offloaded weights, and of its part that has most of them."""
    sizes = [
        sum(p.numel() * p.element_size() for p in part.parameters(recurse=hook.place_submodules))
        for part, hook in offloading(module)
    ]
    return sum(sizes), max(sizes, default=0)


def offloading(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Parts whose weights accelerate fetches for each call, with the hooks that do."""
    for part in module.modules():
        for hook in hooks_of(part):
            if getattr(hook, "offload", False):
                yield part, hook
