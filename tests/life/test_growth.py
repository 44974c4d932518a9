"""Starts in a loop leave nothing behind; ``python -m tools.repeated_starts`` makes 500."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.adapters import tiny
from tests.life.growth import growth, starts, usage


def test_starts_in_a_loop_leave_nothing_behind() -> None:
    model, start = starts()
    before, after, grown = growth(model, start, 12, warm_up=8)
    assert not grown, (before, after)


def test_what_is_left_behind_is_seen() -> None:
    """The negative control: work that keeps one thing of each kind every time."""
    model = tiny.llama()
    kept: list[Any] = []
    end = threading.Event()

    def careless(_: int) -> None:
        kept.append(torch.zeros(4))
        kept.append([[] for _ in range(10)])
        kept.append(open("/dev/null"))  # noqa: SIM115
        kept.append(threading.Thread(target=end.wait))
        kept[-1].start()
        model.register_forward_hook(lambda *_: None)

    try:
        grown = growth(model, careless, 4, warm_up=1)[2]
    finally:
        end.set()
        for held in kept:
            if hasattr(held, "close"):
                held.close()
    found = {line.split(":")[0] for line in grown}
    assert found >= {"tensors", "objects", "descriptors", "threads", "hooks"}, grown


def test_what_a_compiler_traced_with_is_no_memory() -> None:
    model = tiny.llama()
    before = usage(model).tensors
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(torch.zeros(5, 3), static_shapes=False)
    real = torch.zeros(7, 3)
    assert usage(model).tensors - before == real.numel() * real.element_size()
    assert fake.shape[1] == 3
