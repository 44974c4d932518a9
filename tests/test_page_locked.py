"""Offloaded weights are page-locked while they are fetched again and again, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.models import page_locked as module
from lorainit.models.page_locked import page_locked
from tests.adapters.tiny import config, llama

SIZE = 600
"""A square matrix of so many float32 is more than a MiB."""


class Runtime:
    """CUDA's, as far as pages are concerned; it refuses the addresses in `refused`."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.refused: set[int] = set()
        self.calls = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls += 1
        if address in self.locked or address in self.refused:
            return 712
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(
        Tensor, "is_pinned", lambda t: t.untyped_storage().data_ptr() in found.locked
    )
    return found


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4))


def offloaded(place: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """As accelerate offloads, and what waits."""
    model = network()
    held = {name: weight.detach() for name, weight in model.named_parameters()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), state_dict=held)
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = place
    return model, held


def test_large_weights_are_locked_inside_and_free_afterwards(runtime: Runtime) -> None:
    model, held = offloaded("cuda:0")
    large = [held["0.weight"], held["1.weight"]]
    with page_locked(model):
        assert runtime.locked == {t.untyped_storage().data_ptr(): t.nbytes for t in large}
    assert not runtime.locked
    with pytest.raises(ValueError, match="inside"), page_locked(model):
        raise ValueError("inside")
    assert not runtime.locked


def test_two_at_a_time_leave_nothing_locked(runtime: Runtime) -> None:
    model, _ = offloaded("cuda:0")
    with page_locked(model):
        locked = dict(runtime.locked)
        with page_locked(model):
            assert runtime.locked == locked
        assert runtime.locked == locked
    assert not runtime.locked


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_nothing_is_locked_for_another_device(runtime: Runtime, place: str) -> None:
    for model in (offloaded(place)[0], network()):
        with page_locked(model):
            assert runtime.calls == 0


def test_what_the_system_does_not_lock_stays_as_it_is(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the error that CUDA remembers is taken before somebody else's launch meets it."""
    launched: list[object] = []

    def launch(*args: object, **kwargs: object) -> Tensor:
        launched.append(kwargs["device"])
        raise RuntimeError("CUDA error: invalid argument")

    model, held = offloaded("cuda:0")
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=torch.cuda, zeros=launch))
    runtime.refused.add(held["1.weight"].untyped_storage().data_ptr())
    with page_locked(model):
        assert list(runtime.locked) == [held["0.weight"].untyped_storage().data_ptr()]
        assert launched == ["cuda"]
    assert not runtime.locked


def test_weights_on_disk_are_not_read(runtime: Runtime, tmp_path: Any) -> None:
    model = network()
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.execution_device = "cuda:0"
    with page_locked(model):
        assert runtime.calls == 0


def test_what_cannot_be_locked_is_copied_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def empty(*shape: object, **kwargs: object) -> Tensor:
        asked.append(kwargs)
        raise RuntimeError("CUDA error: out of memory")

    own = torch.arange(3.0)
    away: Any = SimpleNamespace(is_cuda=True, shape=(3,), dtype=own.dtype, cpu=lambda: own)
    monkeypatch.setattr(module, "torch", SimpleNamespace(empty=empty))
    assert module.copied_to_host(away) is own
    assert asked == [{"dtype": torch.float32, "pin_memory": True}]
    here = torch.zeros(2)
    assert module.copied_to_host(here) is here.cpu()
    assert len(asked) == 1


def test_whatever_fetches_weights_locks_their_pages_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextmanager
    def spy(model: nn.Module) -> Iterator[None]:
        entered.append(type(model).__name__)
        yield

    for name in ("get_peft_model", "collect_statistics", "suggest_learning_rate"):
        monkeypatch.setattr(import_module(f"lorainit.pipeline.{name}"), "page_locked", spy)
    ids = torch.arange(40).reshape(4, 10) % 16
    data, lora = [{"input_ids": ids, "labels": ids}], config(r=2)
    lorainit.collect_statistics(llama(), lora, data=data, needs={"input_mean"}, progress=False)
    assert len(entered) == 1
    model = lorainit.get_peft_model(
        llama(), lora, method=lorainit.PiSSA(), data=data, suggest_rate=True, progress=False
    )
    assert len(entered) == 3
    with suppress(lorainit.errors.DataError):
        lorainit.suggest_learning_rate(model, data, progress=False)
    assert len(entered) == 4
