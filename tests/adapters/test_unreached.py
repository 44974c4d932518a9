"""Layers that no data reach, and layers smaller than the rank: as PEFT has them, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit import errors
from tests.untouched import untouched

METHODS = {
    "natural": lorainit.Natural(steps=2, rho=1),
    "displaced": lorainit.LoraDA(),
    "anchored": lorainit.FILet(),
    # Redistributed ranks follow the layers' own.
    "zero-b": lorainit.EVA(rho=1),
    "twice the rank": lorainit.LoraGA(),
    "of weights": lorainit.PiSSA(),
}


class Parts(nn.Module):
    """Layers used as models use them: called, never called, without gradient, past their forward."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(6, 12)
            self.gate = nn.Linear(12, 1)
            self.narrow = nn.Linear(12, 3)
            self.pooler = nn.Linear(12, 12)
            self.indexer = nn.Linear(12, 12)
            self.read = nn.Linear(12, 12)
            self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        x = torch.tanh(self.first(x))
        with torch.no_grad():
            kept = self.indexer(x) > -9
        x = x * kept * torch.sigmoid(self.gate(x))
        x = x + F.pad(self.narrow(x), (0, 9)) + F.linear(x, self.read.weight)
        return self.last(x)


TARGETS = ["first", "gate", "narrow", "pooler", "indexer", "read", "last"]


def data(count: int = 30) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(1, 6, generator=generator), "labels": torch.tensor([i % 5])}
        for i in range(count)
    ]


def start(method: Any, model: nn.Module | None = None, **settings: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    settings = {"data": data(), "progress": False, "config": config} | settings
    config = settings.pop("config")
    return lorainit.get_peft_model(model or Parts(), config, method=method, **settings)


def test_each_reason_is_the_true_one(caplog: pytest.LogCaptureFixture) -> None:
    with untouched(base := Parts()):
        found = lorainit.collect_statistics(
            base,
            LoraConfig(target_modules=TARGETS),
            data=data(),
            needs=["gradient"],
            progress=False,
        )
    assert found.metadata["unused_reasons"] == {
        "pooler": "no sequence reached it",
        "indexer": "it ran without gradient",
        "read": "its weight is read directly by Parts",
    }
    assert found.metadata["unused"] == list(found.metadata["unused_reasons"])
    with caplog.at_level(logging.INFO, logger="lorainit"):
        start(METHODS["displaced"])
    for name, why in found.metadata["unused_reasons"].items():
        assert f"{name}: {why}" in caplog.text
    assert "first:" not in caplog.text
    # Inputs need no gradient: this one is reached then.
    inputs = lorainit.collect_statistics(
        Parts(), LoraConfig(target_modules=TARGETS), data=data(), needs=["input_second_moment"],
        progress=False,
    )  # fmt: skip
    assert inputs.metadata["unused"] == ["pooler", "read"]


def test_reasons_are_kept_in_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = lorainit.collect_statistics(
        Parts(), LoraConfig(target_modules=TARGETS), data=data(), progress=False,
        needs=METHODS["displaced"].needs,
    )  # fmt: skip
    found.save(tmp_path / "s.safetensors")
    again = lorainit.Statistics.load(tmp_path / "s.safetensors")
    with caplog.at_level(logging.INFO, logger="lorainit"):
        start(METHODS["displaced"], data=None, statistics=again)
    assert "read: its weight is read directly by Parts" in caplog.text


def factors(wrapped: PeftModel, name: str) -> tuple[Tensor, Tensor]:
    layer = wrapped.get_base_model().get_submodule(name)
    return tuple(  # type: ignore[return-value]
        getattr(factor, "trained", getattr(factor, "weight", None)).detach()
        for factor in (layer.lora_A["default"], layer.lora_B["default"])
    )


@pytest.mark.parametrize("kind", METHODS)
def test_small_layers_keep_the_rank_as_stock_peft(kind: str, tmp_path: Path) -> None:
    method = METHODS[kind]
    wrapped = start(method)
    factor = 2 if kind == "twice the rank" else 1
    anchored = kind in ("anchored", "twice the rank", "of weights")
    for name, own in (("gate", 1 // factor), ("narrow", 3 // factor)):
        a, b = factors(wrapped, name)
        assert a.shape == (4, 12)
        assert not b[:, own:].any()
        # A default's rows, not zeros: a zero row of A beside a zero column of B learns nothing.
        assert (a[own:].abs() <= 12**-0.5).all()
        assert (torch.linalg.vector_norm(a[own:], dim=1) > 0.2).all()
        assert wrapped.get_base_model().get_submodule(name).scaling["default"] == 2.0
        if own and kind != "zero-b":
            assert b[:, :own].any() or kind == "natural"
    x = data(1)[0]["x"]
    if anchored:
        assert torch.equal(wrapped(x=x), Parts()(x))
        assert factors(wrapped, "first")[1].any()
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Parts(), tmp_path)
    torch.testing.assert_close(again(x=x), wrapped(x=x), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(x=x).square().sum().backward()
    optimizer.step()
    assert factors(wrapped, "narrow")[1][:, 3 // factor :].any()


def test_the_factors_of_its_own_rank_are_those_of_a_small_adapter() -> None:
    narrow = factors(start(METHODS["displaced"]), "narrow")
    small = LoraConfig(r=3, lora_alpha=6, target_modules=["narrow"])
    alone = factors(start(METHODS["displaced"], config=small), "narrow")
    for found, expected in ((narrow[0][:3], alone[0]), (narrow[1][:, :3], alone[1])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_they_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lorainit"):
        start(METHODS["displaced"])
    assert "filled up as PEFT would: gate: 1 of 4; narrow: 3 of 4" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lorainit"):
        start(METHODS["twice the rank"])
    assert "gate: it is too small for the method" in caplog.text


def test_whoever_wants_an_error_gets_it() -> None:
    with untouched(base := Parts()), pytest.raises(errors.RankError, match="'gate' has rank 4"):
        start(METHODS["displaced"], base, on_unused="raise")
    reached = LoraConfig(r=1, target_modules=TARGETS)
    with untouched(base), pytest.raises(errors.TargetError, match="'pooler', 'indexer', 'read'"):
        start(METHODS["displaced"], base, config=reached, on_unused="raise")
    nothing = LoraConfig(r=1, target_modules=["pooler", "indexer"])
    with untouched(base), pytest.raises(errors.TargetError, match="does not depend on"):
        start(METHODS["displaced"], base, config=nothing)


def test_cap_rank_lowers_the_rank_itself() -> None:
    wrapped = start(METHODS["displaced"], cap_rank=True)
    assert factors(wrapped, "narrow")[0].shape == (3, 12)
    assert factors(wrapped, "gate")[0].shape == (1, 12)


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_an_adapter_that_is_started_again(kind: str) -> None:
    wrapped = start(METHODS[kind])
    again = lorainit.get_peft_model(
        wrapped, None, method=METHODS[kind], data=data(), progress=False
    )
    a, b = factors(again, "gate")
    assert a.shape == (4, 12)
    assert b[:, 0].any()
    assert not b[:, 1:].any()


class Sometimes(Parts):
    """Batches of two kinds, of which one reaches no target at all."""

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        return x[:, :5] if bool((x == 0).all()) else super().forward(x)


@pytest.mark.parametrize("first", [True, False])
def test_a_batch_may_reach_nothing(first: bool) -> None:
    empty = [{"x": torch.zeros(1, 6), "labels": torch.tensor([0])}] * 2
    rows = [*empty, *data()] if first else [*data(), *empty]
    config = LoraConfig(r=1, target_modules=TARGETS)
    arguments: dict[str, Any] = {"needs": ["gradient"], "progress": False}
    found = lorainit.collect_statistics(Sometimes(), config, data=rows, **arguments)
    truth = lorainit.collect_statistics(Sometimes(), config, data=data(), **arguments)
    assert found["first"].sequences == truth["first"].sequences + 2
    assert torch.equal(found["first"].gradient_sum, truth["first"].gradient_sum)


class Alternating(Parts):
    """A branch for some inputs only: a later step's sequences may not reach it."""

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        y = super().forward(x)
        return y + self.pooler(torch.tanh(self.first(x)))[:, :5] if bool(x[0, 0] > 1.5) else y


def test_a_layer_that_a_later_step_does_not_reach_stays_where_it_is() -> None:
    rows = data(40)
    odd = [row for row in rows if float(row["x"][0, 0]) > 1.5]
    even = [row for row in rows if float(row["x"][0, 0]) <= 1.5]
    assert odd
    # The only sequence of its kind is held back from the second step's statistics.
    order = [*even[:3], odd[0], *even[3:]]
    wrapped = start(METHODS["natural"], Alternating(), data=order)
    assert all(bool(p.isfinite().all()) for p in wrapped.parameters())


def test_experts_that_all_linear_passes_over_are_mentioned(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.life.mixtures import mixtral

    monkeypatch.setattr("lorainit.adapters.targets.converted", lambda *_: None)
    from lorainit.adapters.targets import match_targets, skipped_experts

    config = LoraConfig(r=2, target_modules="all-linear")
    model = mixtral()
    found = skipped_experts(model, config, match_targets(model, config))
    assert found[0] == "model.layers.0.mlp.experts.gate_up_proj"
    named = LoraConfig(r=2, target_modules=["q_proj"])
    assert not skipped_experts(model, named, match_targets(model, named))
