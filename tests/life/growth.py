"""What repeated work leaves behind: memory, descriptors, threads, hooks."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import lorainit
from tests.adapters import tiny

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OBJECTS_A_RUN = 3
"""Objects of the interpreter's own (warnings it has seen, caches) that a run may leave."""


@dataclass(frozen=True)
class Usage:
    """Of the whole process, after the garbage is collected.

    Attributes:
        resident: bytes in memory.
        tensors: bytes of all tensors that are alive.
        objects: that the garbage collector knows.
        descriptors: open files and sockets.
        threads: of Python.
        hooks: of the model's modules, and global ones.
    """

    resident: int
    tensors: int
    objects: int
    descriptors: int
    threads: int
    hooks: int


def usage(model: nn.Module) -> Usage:
    """As it is now."""
    gc.collect()
    every = gc.get_objects()
    # Not isinstance(): objects that only look like others would be built by it.
    held = {id(t): t for t in every if _takes_memory(t)}
    tables = [vars(torch.nn.modules.module)[name] for name in _global_tables()]
    tables += [getattr(m, name) for m in model.modules() for name in HOOKS]
    return Usage(
        _resident(),
        sum(t.numel() * t.element_size() for t in held.values()),
        len(every),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        sum(map(len, tables)),
    )


def _takes_memory(thing: object) -> bool:
    """Whether it is a tensor with entries: what a compiler traced with has none, and no size either."""
    kind = type(thing)
    tensor = issubclass(kind, Tensor) and not issubclass(kind, FakeTensor)
    return tensor and not thing.is_meta  # type: ignore[attr-defined]


def _global_tables() -> list[str]:
    every = vars(torch.nn.modules.module)
    return [n for n, v in every.items() if n.startswith("_global_") and isinstance(v, dict)]


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def starts() -> tuple[nn.Module, Callable[[int], None]]:
    """A base model, and one start on it of this number: saved, loaded again, taken off."""
    model = tiny.llama()
    methods = (lorainit.LoraDA(), lorainit.PiSSA(), lorainit.EVA(rho=1.0), lorainit.Natural())
    data = [tiny.batch(4, 6, seed=s) for s in range(2)]

    def start(number: int) -> None:
        method: Any = methods[number % len(methods)]
        wrapped = lorainit.get_peft_model(
            model, tiny.config(), method=method, data=data, progress=False
        )
        with tempfile.TemporaryDirectory() as folder:
            lorainit.save_adapter(wrapped, folder)
            lorainit.load_adapter(wrapped, folder, adapter_name="again")
        wrapped.unload()

    return model, start


def growth(
    model: nn.Module, work: Callable[[int], None], count: int, warm_up: int
) -> tuple[Usage, Usage, list[str]]:
    """Usage after the warm-up and after `count` more runs, and what has grown between the two."""
    for number in range(warm_up):
        work(number)
    before = usage(model)
    for number in range(count):
        work(number)
    after = usage(model)
    allowed = {"resident": max(16 << 20, before.resident // 50), "objects": _OBJECTS_A_RUN * count}
    grown = [
        f"{name}: {first} to {last}"
        for (name, first), last in zip(asdict(before).items(), asdict(after).values(), strict=True)
        if last - first > allowed.get(name, 0)
    ]
    return before, after, grown
