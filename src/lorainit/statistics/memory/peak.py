"""What a batch takes beside the statistics, and which layers read one input: measured on one row."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are made inside and still alive, and their peak.

    For devices without an allocator that counts. What operations take for themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count what it made."""
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            # What comes from outside is nobody's new memory, nor are views of it.
            self._note(value, new=False)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            self._note(value, new=True)
        return result

    def _note(self, value: Any, *, new: bool) -> None:
        # Tensors that wrap others (sharded, quantized) have no storage of their own, and meta ones no bytes.
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            return
        if value.is_meta:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if new else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """How many more bytes than at the start were ever held inside.

    On CUDA by the allocator, whose own record of its peak starts anew.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with LiveBytes() as meter:
        yield lambda: meter.peak


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """What lies on the device before any work: all there is on CUDA, else the model."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    found: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        own = getattr(tensor, "_local_tensor", tensor)
        if own.device.type != device.type:
            continue
        if type(own) in (Tensor, nn.Parameter) and own.layout == torch.strided:
            storage = own.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        else:
            found[id(own)] = own.numel() * own.element_size()
    return sum(found.values())
