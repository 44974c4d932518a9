"""A start within a budget that only one pass block by block fits is the start without a budget."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig

import lorainit
from lorainit.calibration.step_stack import StepStack
from lorainit.methods import CGLoRA, LoraOne
from lorainit.statistics.memory.peak import held_bytes
from tests.statistics.test_plan import batches, model_and_modules

METHODS: dict[str, tuple[Any, int]] = {
    "LoRA-DA": (lorainit.LoraDA(), 900_000),
    "FILet": (lorainit.FILet(), 900_000),
    "Auto": (lorainit.Auto(least_gain=0.0), 900_000),
    "Natural, two steps": (lorainit.Natural(steps=2), 900_000),
    "CG-LoRA": (CGLoRA(), 900_000),
    "CG-LoRA, calibrated": (CGLoRA(scale="calibrated"), 900_000),
    "LoRA-One": (LoraOne(), 600_000),
    "KroneckerQER": (lorainit.KroneckerQER(), 600_000),
    "KroneckerQER, ranks shared out": (lorainit.KroneckerQER(rho=2), 600_000),
}
"""Each with the bytes beside the model that only one pass block by block fits."""


def started(method: Any, budget: int | None, **more: Any) -> dict[str, torch.Tensor]:
    model, _ = model_and_modules(hidden=32, inner=64, layers=4)
    model.double()
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="all-linear")
    data = batches(rows=4, length=8, count=4)
    if getattr(method, "needs_reference", False):
        full = {n: w + 0.1 * w.roll(1, -1) for n, w in model.state_dict().items()}
        more["reference_weights"] = full
    wrapped = lorainit.get_peft_model(
        model, config, method=method, data=data, max_memory=budget, progress=False, **more
    )
    return {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n}


def budget_for_blocks(room: int) -> int:
    model, _ = model_and_modules(hidden=32, inner=64, layers=4)
    return held_bytes(model.double(), torch.device("cpu")) + room


@pytest.mark.parametrize("name", METHODS)
def test_a_start_by_blocks_is_the_start_without_a_budget(name: str, caplog: Any) -> None:
    method, room = METHODS[name]
    truth = started(method, None)
    with caplog.at_level("INFO", logger="lorainit"):
        found = started(method, budget_for_blocks(room))
    assert "block by block" in caplog.text
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    # The control: other data are another start.
    other = started(method, None, max_sequences=12)
    assert any(not torch.allclose(other[key], truth[key], rtol=1e-4) for key in truth)


def test_statistics_of_a_block_are_gone_when_the_next_ones_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The default method keeps its steps, and nothing of what they were solved from."""
    alive: list[int] = []
    seen: list[weakref.ref[object]] = []
    work = StepStack.forgetting

    def spy(self: StepStack, method: Any, statistics: Any, counts: Any) -> StepStack:
        gc.collect()
        part = id(statistics)
        alive.append(sum(r() is not None and id(r()) != part for r in seen))
        seen.append(weakref.ref(statistics))
        return work(self, method, statistics, counts)

    monkeypatch.setattr(StepStack, "forgetting", spy)
    started(lorainit.Auto(least_gain=0.0), budget_for_blocks(900_000))
    assert len(set(map(id, seen))) >= 4
    assert not any(alive)


@pytest.mark.parametrize("name", ["LoRA-DA", "FILet", "Auto"])
def test_a_rate_by_blocks_is_the_rate_without_a_budget(name: str, caplog: Any) -> None:
    """Gradients at moved factors, also of factors that stand elsewhere than at the base."""
    model, _ = model_and_modules(hidden=32, inner=64, layers=4)
    model.double()
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="all-linear")
    rows = torch.arange(12) + torch.arange(16)[:, None] % 6
    data = [{"input_ids": part, "labels": part} for part in rows.split(4)]
    wrapped = lorainit.get_peft_model(
        model, config, method=METHODS[name][0], data=data, progress=False
    )
    truth = lorainit.suggest_learning_rate(wrapped, data, progress=False)
    room = held_bytes(wrapped, torch.device("cpu")) + 500_000
    with caplog.at_level("INFO", logger="lorainit"):
        found = lorainit.suggest_learning_rate(wrapped, data, max_memory=room, progress=False)
    assert "block by block" in caplog.text
    assert found.two_steps == pytest.approx(truth.two_steps, rel=1e-4)
    assert [loss for _, loss in found.trials] == pytest.approx(
        [loss for _, loss in truth.trials], rel=1e-5
    )
    # Control: of other sequences it is another.
    fewer = lorainit.suggest_learning_rate(wrapped, data[:2], progress=False)
    assert fewer.start_loss != pytest.approx(truth.start_loss, rel=1e-4)
