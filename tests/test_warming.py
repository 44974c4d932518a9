"""Libraries loaded beside the first pass: once, quietly, and without a trace."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from peft import LoraConfig

import lorainit
from lorainit import pipeline, start, warming
from lorainit.methods import EVA, CorDA, FILet, LoraDA, LoraGA, LoraOne, Natural
from lorainit.types import Factors, LayerStatistics
from lorainit.warming import libraries_loading

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded yet, and what would be on a device is on the host."""
    monkeypatch.setattr(warming, "_loaded", set())
    monkeypatch.setattr(warming, "_SIZE", 64)


class Recording:
    """A method that notes where it is asked to solve."""

    needs = frozenset({"gradient"})
    __module__ = "lorainit.methods.recording"

    def __init__(self, error: Exception | None = None) -> None:
        self.threads: list[str] = []
        self.error = error

    def solve(
        self, weight: torch.Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return Factors(weight[..., :rank, :], weight[..., :rank])


@pytest.mark.parametrize("method", [LoraDA, FILet, Natural, EVA, CorDA, LoraGA, LoraOne])
def test_every_method_can_solve_what_is_made_up(
    method: type, caplog: pytest.LogCaptureFixture
) -> None:
    state = torch.get_rng_state()
    with caplog.at_level(logging.DEBUG, "lorainit"):
        warming._solve_one(method(), CPU)
    assert "not loaded" not in caplog.text
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def first_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which thread asks PyTorch for a decomposition first; what is for a device is done on the host."""
    threads: list[str] = []

    def asked(*args: object, **kwargs: object) -> None:
        threads.append(threading.current_thread().name)

    work = warming._solve_one
    monkeypatch.setattr(warming, "_solve_one", lambda method, device: work(method, CPU))
    monkeypatch.setattr(torch, "ones", lambda *args, device: None)
    monkeypatch.setattr(torch.linalg, "solve_triangular", asked)
    return threads


def test_once_in_a_process_and_beside_the_work(first_calls: list[str]) -> None:
    method = Recording()
    for _ in range(2):
        with libraries_loading(method, CUDA):
            pass
    assert method.threads == ["lorainit-warming"]
    # Two threads at PyTorch's first decomposition are an error in one of them.
    assert first_calls == ["MainThread"]
    assert "lorainit-warming" not in {thread.name for thread in threading.enumerate()}


def test_a_method_of_the_users_own_solves_what_was_collected_alone(first_calls: list[str]) -> None:
    class Own(Recording):
        __module__ = "somewhere.else"

    method = Own()
    with libraries_loading(method, CUDA):
        pass
    assert not method.threads


def test_a_processor_has_nothing_to_load() -> None:
    method = Recording()
    with libraries_loading(method, CPU):
        pass
    assert not method.threads


def test_a_device_that_cannot_is_left_alone(
    first_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no library")

    monkeypatch.setattr(torch.linalg, "solve_triangular", refused)
    method = Recording()
    with libraries_loading(method, CUDA):
        pass
    assert not method.threads


def test_what_goes_wrong_there_is_told_where_it_matters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "lorainit"):
        warming._solve_one(Recording(ValueError("broken")), CPU)
    assert "broken" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


def test_a_start_asks_for_it_where_a_pass_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        pipeline,
        "libraries_loading",
        lambda method, device: asked.append(device) or libraries_loading(method, device),
    )
    plan = start.prepare
    monkeypatch.setattr(start, "prepare", lambda *args: asked.append("plan") or plan(*args))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).square().sum(-1)

    config = LoraConfig(r=2, target_modules=["0"])
    data = [{"x": torch.randn(4, 8)}]
    wrapped = lorainit.get_peft_model(
        model, config, method=LoraGA(), data=data, loss_fn=loss, progress=False
    )
    # What a batch takes is measured before anything else takes memory.
    assert asked == ["plan", CPU]
    # Where ranks follow from all layers' statistics, too.
    other = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lorainit.get_peft_model(other, config, method=EVA(), data=data, loss_fn=loss, progress=False)
    assert asked.pop() == CPU
    statistics = lorainit.collect_statistics(
        wrapped.unload(), config, data=data, needs={"gradient"}, loss_fn=loss, progress=False
    )
    lorainit.get_peft_model(model, config, method=LoraGA(), statistics=statistics, progress=False)
    assert asked == ["plan", CPU]
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lorainit.get_peft_model(
        model,
        config,
        method=LoraGA(),
        data=data,
        loss_fn=loss,
        max_memory="1GiB",
        progress=False,
    )
    # Within a budget nothing is there that was not planned.
    assert asked == ["plan", CPU, "plan"]
