"""The host's memory in locked pages, between which and a device one copies at full speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.models.introspection import execution_device
from lorainit.models.resident import offloading

_LEAST_BYTES = 1 << 20
"""Smaller tensors may share a page with others, and take no time."""


@contextmanager
def page_locked(model: nn.Module) -> Iterator[None]:
    """Inside, offloaded weights that a CUDA device fetches lie in page-locked memory, where they are.

    Nothing is copied or allocated. What lies on disk, and what the system does not let one lock, is fetched
    as before.
    """
    with ExitStack() as stack:
        for address, size in _stretches(model).items():
            if not _lock(address, size):
                break
            stack.callback(_unlock, address)
        yield


def copied_to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a CUDA tensor in locked pages, which later copies use once it is gone.

    Fresh memory costs several times the copy, page by page. Where so much cannot be locked, it is ordinary.
    """
    if tensor.is_cuda:
        with suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return tensor.cpu()


def _stretches(model: nn.Module) -> dict[int, int]:
    """Bytes by address of the weights that wait in memory for a CUDA device."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    for part, hook in offloading(model):
        place, held = execution_device(part), _in_memory(hook)
        if place is None or place.type != "cuda" or id(held) in seen:
            continue
        seen.add(id(held))
        for tensor in held.values():
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes() >= _LEAST_BYTES and not tensor.is_pinned():
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def _in_memory(hook: Any) -> Mapping[str, Any]:
    """Of a hook's weights those that are not on disk."""
    weights = getattr(hook.weights_map, "dataset", hook.weights_map)
    held = getattr(weights, "state_dict", weights)
    return held if isinstance(held, dict) else {}


def _lock(address: int, size: int) -> bool:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(runtime.cudaHostRegister(address, size, 0)) == 0:
        return True
    # The runtime keeps its last error for whoever launches next.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _unlock(address: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)
