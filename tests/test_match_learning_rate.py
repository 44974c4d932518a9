"""An adapter that is matched to a rate: the same function, and the same training at that rate, step by step."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import lorainit
from lorainit.adapters.layers import is_anchored
from lorainit.errors import AdapterError, MissingStatisticError
from tests.adapters import tiny
from tests.adapters.started import KINDS, STARTS, build, inputs, out, relative
from tests.test_learning_rate import classifier, sequences, started, suggestion

METHODS = {
    "plain": lorainit.Vanilla(),
    "displaced": lorainit.LoraDA(scale="calibrated"),
    "anchored": lorainit.PiSSA(),
}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def losses(
    model: nn.Module, rate: float, optimizer: Callable[..., Any], steps: int = 8
) -> list[float]:
    """Of every step of training, before it."""
    model.train()
    rule = optimizer([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for batch in (sequences() * steps)[:steps]:
        loss = model(**batch).loss
        rule.zero_grad()
        loss.backward()
        rule.step()
        found.append(loss.item())
    return found


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, eps=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", [0.05, 7.0])
def test_training_at_the_matched_rate_takes_the_same_steps(method: str, ratio: float) -> None:
    """Adam, with torch's own; plain gradient descent, whose steps depend on sizes, does not."""
    model = started(METHODS[method])
    resized = copy.deepcopy(model)
    k = lorainit.match_learning_rate(resized, 2e-2, 2e-2 * ratio)
    expected = losses(copy.deepcopy(model), 2e-2, adam)
    assert losses(copy.deepcopy(resized), 2e-2 * k, adam) == pytest.approx(expected, rel=1e-4)
    # As much as the rate alone changes is seen.
    elsewhere = losses(copy.deepcopy(model), 2e-2 * k, adam)
    assert max(abs(a - b) for a, b in zip(elsewhere, expected, strict=True)) > 0.01
    descent = losses(copy.deepcopy(model), 1e-1, torch.optim.SGD)
    other = losses(resized, 1e-1 * k, torch.optim.SGD)
    assert max(abs(a - b) for a, b in zip(other, descent, strict=True)) > 1e-3


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays_on_every_kind_of_layer(kind: str, start: str, tmp_path: Path) -> None:
    """In memory, after training, merged, and read by stock PEFT."""
    case = build(kind, start)
    before = out(case.model)
    k = lorainit.match_learning_rate(case.model, 1e-3, 2e-4)
    # The square root of a power of two, half a step of it away at most.
    assert k == pytest.approx(2**-2.5)
    assert relative(out(case.model), before) < 1e-5
    if start == "anchored":
        fresh = case.started()
        base = out(case.fresh())
        lorainit.match_learning_rate(fresh, 1e-3, 2e-4)
        # The two halves are multiplied alike: where their products are taken one by one, not summed by PEFT as
        # a stack's are, the difference is still zero to the last bit.
        assert relative(out(fresh), base) <= (1e-6 if kind == "expert" else 0)
    case.model.save_pretrained(str(tmp_path))
    assert relative(out(peft.PeftModel.from_pretrained(case.fresh(), str(tmp_path))), before) < 1e-5
    loaded = lorainit.load_adapter(case.fresh(), tmp_path)
    assert relative(out(loaded), before) < 1e-5
    assert loaded.peft_config["default"].origin.resized == k


def test_alphas_are_multiplied_by_a_power_of_two_and_patterns_follow() -> None:
    model = peft.get_peft_model(
        tiny.llama(),
        tiny.config(
            r=4,
            lora_alpha=8,
            use_rslora=True,
            alpha_pattern={"q_proj": 4},
            rank_pattern={"v_proj": 2},
        ),
    )
    before = {n: m.scaling["default"] for n, m in lora_layers(model).items()}
    k = lorainit.match_learning_rate(model, 1.1e-3, 2e-4)
    config = model.peft_config["default"]
    assert config.lora_alpha == 8 * 32
    assert k == pytest.approx(2**-2.5)
    assert config.alpha_pattern == {"q_proj": 4 * 32}
    for name, scaling in before.items():
        layer = model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(scaling / k**2)
        layer.set_scale("default", 1.0)
        assert layer.scaling["default"] == pytest.approx(scaling / k**2)
    small = peft.get_peft_model(tiny.llama(), tiny.config(r=4, lora_alpha=8))
    assert lorainit.match_learning_rate(small, 1e-4, 1e-3) == pytest.approx(2**3.5)
    assert small.peft_config["default"].lora_alpha == 8 / 128
    # Near enough: nothing is changed.
    assert lorainit.match_learning_rate(small, 1e-4, 1.1e-4) == 1
    assert small.peft_config["default"].lora_alpha == 8 / 128


def test_other_adapters_and_the_users_configuration_stay() -> None:
    wanted = tiny.config(r=4)
    model = peft.get_peft_model(tiny.llama(), wanted, adapter_name="one")
    model.add_adapter("two", wanted)
    model.add_adapter("three", tiny.config(r=4, target_modules=["embed_tokens", "q_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name in ("two", "three"):
        k = lorainit.match_learning_rate(model, 1e-3, 1e-4, adapter_name=name)
        for key, parameter in model.named_parameters():
            expected = before[key] * (k if f".{name}" in key else 1)
            torch.testing.assert_close(parameter, expected)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert wanted.lora_alpha == model.peft_config["one"].lora_alpha == 8
    two, three = (model.peft_config[name].lora_alpha for name in ("two", "three"))
    assert two == three == 8 * 128


def test_factors_that_two_layers_share_are_multiplied_once() -> None:
    wanted = tiny.config(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = peft.get_peft_model(tiny.llama(tied=True), wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = tiny.logits(model)
    assert (before - tiny.logits(tiny.llama(tied=True))).abs().max() > 1e-3
    lorainit.match_learning_rate(model, 1e-3, 1e-4)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_magnitude_of_dora_stays() -> None:
    model = tiny.start(tiny.llama(), lorainit.PiSSA(), tiny.config(use_dora=True))
    before = tiny.logits(model)
    lorainit.match_learning_rate(model, 1e-3, 1e-4)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_with_the_start(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = started(METHODS[method], suggest_rate=True)
    suits = known.peft_config["default"].origin.measured["learning_rate"]
    with caplog.at_level("INFO", logger="lorainit"):
        model = started(METHODS[method], learning_rate=suits / 6)
    origin = model.peft_config["default"].origin
    line = next(text for text in caplog.messages if "Matched to the learning rate" in text)
    assert f"as configured {suits:.2g} would suit it" in line
    assert origin.resized == pytest.approx(2**-2.5)
    measured = origin.measured
    assert measured["learning_rate"] == pytest.approx(suits / 6)
    assert (
        measured["learning_rate_low"] < measured["learning_rate"] < measured["learning_rate_high"]
    )
    # What was tried is told in rates of the adapter as it is now.
    mine, theirs = (
        m.peft_config["default"].origin.measured["learning_rate_trials"] for m in (model, known)
    )
    assert [loss for _, loss in mine] == [loss for _, loss in theirs]
    assert [rate for rate, _ in mine] == pytest.approx([r * origin.resized for r, _ in theirs])
    hand = copy.deepcopy(known)
    lorainit.match_learning_rate(hand, suits, suits / 6)
    for (name, one), (_, other) in zip(
        model.named_parameters(), hand.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    model.save_pretrained(str(tmp_path))
    content = json.loads((tmp_path / "lorainit.json").read_text())
    assert content["resized"] == origin.resized
    assert content["lora_alpha"] == model.peft_config["default"].lora_alpha


@pytest.mark.parametrize("method", METHODS)
def test_started_again_it_is_what_it_would_have_been(method: str) -> None:
    """The scaling that it was configured with comes back first; asked with that configuration or with none."""
    model = started(lorainit.PiSSA(), learning_rate=1e-4)
    fresh = started(METHODS[method])
    torch.manual_seed(5)
    again = lorainit.get_peft_model(
        model, None, method=METHODS[method], data=sequences(), progress=False
    )
    assert again.peft_config["default"].origin.resized == 1
    assert again.peft_config["default"].lora_alpha == fresh.peft_config["default"].lora_alpha
    for name, layer in lora_layers(fresh).items():
        other = again.get_submodule(name)
        assert other.scaling == layer.scaling
        assert other.lora_alpha == layer.lora_alpha
        assert is_anchored(other, "default") == is_anchored(layer, "default")
    if method != "plain":
        torch.testing.assert_close(tiny.logits(again), tiny.logits(fresh), rtol=1e-4, atol=1e-5)
    lorainit.get_peft_model(
        model, tiny.config(r=4), method=METHODS[method], data=sequences(), learning_rate=3e-4, progress=False
    )  # fmt: skip
    twice = model.peft_config["default"].origin.resized
    once = started(METHODS[method], learning_rate=3e-4).peft_config["default"].origin.resized
    if method != "plain":
        assert twice == pytest.approx(once, rel=0.05)


def test_a_start_that_fails_leaves_a_matched_adapter_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = started(lorainit.LoraDA(), learning_rate=1e-4)
    before, alpha = copy.deepcopy(model.state_dict()), model.peft_config["default"].lora_alpha
    scalings = [dict(m.scaling) for m in lora_layers(model).values()]

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an accident")

    module = importlib.import_module("lorainit.pipeline.get_peft_model")
    monkeypatch.setattr(module, "rate_if_any", fail)
    with pytest.raises(RuntimeError, match="an accident"):
        lorainit.get_peft_model(
            model,
            None,
            method=lorainit.PiSSA(),
            data=sequences(),
            learning_rate=1e-3,
            progress=False,
        )
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.peft_config["default"].lora_alpha == alpha
    assert scalings == [dict(m.scaling) for m in lora_layers(model).values()]


def test_where_no_rate_can_be_suggested_nothing_is_resized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="lorainit"):
        model = classifier(task_type="SEQ_CLS", learning_rate=1e-4)
    said = (
        "Not matched to the learning rate 0.0001: no learning rate can be suggested for an adapter"
    )
    assert any(said in line for line in caplog.messages)
    config = model.peft_config["default"]
    assert (config.lora_alpha, config.origin.resized) == (8, 1.0)


def test_what_cannot_be_done_is_said_first() -> None:
    with pytest.raises(MissingStatisticError, match=r"learning_rate=0\.0002 is matched by"):
        lorainit.get_peft_model(
            tiny.llama(), tiny.config(), method=lorainit.PiSSA(), learning_rate=2e-4
        )
    for value in (0.0, -1e-4, float("nan"), "2e-4", True):
        with pytest.raises(AdapterError, match="learning_rate must be"):
            started(lorainit.Vanilla(), learning_rate=value)
    with pytest.raises(AdapterError, match="lora_bias=True cannot be matched"):
        lorainit.get_peft_model(
            tiny.llama(), tiny.config(lora_bias=True), method=lorainit.Vanilla(), data=sequences(),
            learning_rate=2e-4,
        )  # fmt: skip
    empty = peft.get_peft_model(tiny.llama(), tiny.config(), low_cpu_mem_usage=True)
    with pytest.raises(AdapterError, match="are on the meta device"):
        lorainit.match_learning_rate(empty, 1e-3, 1e-4)
    assert empty.peft_config["default"].lora_alpha == 8
    model = started(lorainit.Vanilla())
    with pytest.raises(AdapterError, match="no LoRA adapter 'other' to match"):
        lorainit.match_learning_rate(model, 1e-3, 1e-4, adapter_name="other")
    with pytest.raises(AdapterError, match="suggested must be"):
        lorainit.match_learning_rate(model, 0.0, 1e-4)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into layer"):
        lorainit.match_learning_rate(model, 1e-3, 1e-4)


def test_a_side_file_from_before_is_of_an_adapter_that_was_not_resized(tmp_path: Path) -> None:
    started(lorainit.PiSSA()).save_pretrained(str(tmp_path))
    path = tmp_path / "lorainit.json"
    content = json.loads(path.read_text())
    del content["resized"]
    path.write_text(json.dumps(content))
    assert lorainit.load_adapter(tiny.llama(), tmp_path).peft_config["default"].origin.resized == 1


def test_a_half_precision_adapter_trains_alike() -> None:
    """bfloat16 has the same digits at every size: what is lost by the factor is one rounding."""
    model = started(lorainit.Vanilla()).to(torch.bfloat16)
    before, suits = out_of(model), suggestion(model).value
    k = lorainit.match_learning_rate(model, 1e-3, 3e-5)
    torch.testing.assert_close(out_of(model), before, rtol=2e-2, atol=2e-2)
    assert suggestion(model).value == pytest.approx(suits * k, rel=0.1)


@torch.no_grad()
def out_of(model: nn.Module) -> Tensor:
    return model(**{"input_ids": inputs()["input_ids"] % 6}).logits.float()
