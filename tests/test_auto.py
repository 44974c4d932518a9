"""Auto: Natural where its measured step is worth it, the plain PEFT run where it is not."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.calibration import SearchResult
from lorainit.errors import MissingStatisticError
from tests.adapters.tiny import config, llama
from tests.test_refinement import sequences


def adapter(model: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in peft.get_peft_model_state_dict(model).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(v, second[k]) for k, v in first.items()
    )


def started(method: Any, **named: Any) -> Any:
    torch.manual_seed(5)
    return lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=sequences(), progress=False, **named
    )


def gain_of(model: Any) -> float:
    measured = origin_of(model, "default").measured
    return 1 - measured["start_loss"] / measured["base_loss"]


def test_worth_it_is_natural_and_not_worth_it_is_plain_peft() -> None:
    torch.manual_seed(5)
    plain = adapter(peft.get_peft_model(llama(), config(r=4)))
    # A small random model has far to go.
    natural = started(lorainit.Natural(trust_region=10.0))
    gain = gain_of(natural)
    assert 0.005 < gain < 0.9
    below, above = 0.9 * gain, min(1.1 * gain, 0.99)
    assert same(
        adapter(started(lorainit.Auto(least_gain=below, trust_region=10.0))), adapter(natural)
    )
    fallen = started(lorainit.Auto(least_gain=above, trust_region=10.0))
    assert same(adapter(fallen), plain)
    assert not same(adapter(natural), plain)
    # The random numbers that follow are the plain run's, too.
    after = torch.rand(3)
    torch.manual_seed(5)
    peft.get_peft_model(llama(), config(r=4))
    assert torch.equal(torch.rand(3), after)


def test_the_record_of_a_plain_start_promises_nothing() -> None:
    model = started(lorainit.Auto(least_gain=0.99))
    origin = origin_of(model, "default")
    assert origin.settings["method"] == "Auto"
    assert origin.measured["length"] == 0
    assert origin.measured["start_loss"] == origin.measured["base_loss"] > 0
    assert origin.measured["refused_loss"] < origin.measured["base_loss"]
    assert "refused_loss" not in origin_of(started(lorainit.Natural()), "default").measured


def test_the_line_says_what_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lorainit"):
        started(lorainit.Auto(least_gain=0.99))
    line = next(text for text in caplog.messages if text.startswith("Auto: "))
    assert "plain LoRA: the measured start would take" in line
    assert "less than 99%" in line
    assert "Left at PEFT's start" not in line


def test_an_adapter_that_was_there_gets_plain_factors() -> None:
    model = started(lorainit.Natural())
    before = adapter(model)
    lorainit.get_peft_model(
        model, None, method=lorainit.Auto(least_gain=0.99), data=sequences(), progress=False
    )
    now = adapter(model)
    assert all(not v.any() for k, v in now.items() if "lora_B" in k)
    for key, value in now.items():
        if "lora_A" in key:
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < float(value.abs().max()) <= bound
            assert not torch.equal(value, before[key])


def test_ranks_that_were_redistributed_go_back() -> None:
    torch.manual_seed(5)
    plain = adapter(peft.get_peft_model(llama(), config(r=4)))
    assert same(adapter(started(lorainit.Auto(least_gain=0.99, rho=2.0))), plain)
    natural = adapter(started(lorainit.Auto(least_gain=0.0, rho=2.0)))
    assert {v.shape[0] for k, v in natural.items() if "lora_A" in k} != {4}


def test_several_steps_are_judged_by_the_last() -> None:
    at_once = {"trust_region": 10.0, "steps": 3}
    gain = gain_of(started(lorainit.Natural(**at_once)))
    one = gain_of(started(lorainit.Natural(trust_region=10.0)))
    assert gain > one
    kept = started(lorainit.Auto(least_gain=(gain + one) / 2, **at_once))
    assert gain_of(kept) == pytest.approx(gain)
    assert gain_of(started(lorainit.Auto(least_gain=1.1 * gain, **at_once))) == 0


def test_statistics_alone_are_natural_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to measure on: no start is refused."""
    found = lorainit.collect_statistics(
        llama(), config(r=4), data=sequences(), needs=lorainit.Auto().needs, progress=False
    )
    given = {"statistics": found, "progress": False}
    auto, natural = (
        lorainit.get_peft_model(llama(), config(r=4), method=method, **given)
        for method in (lorainit.Auto(least_gain=0.99), lorainit.Natural())
    )
    assert same(adapter(auto), adapter(natural))
    assert any("there is no data to measure" in text for text in caplog.messages)


def test_a_length_that_is_given_and_a_condition_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="leave length at None, or least_gain at 0"):
        lorainit.Auto(length=0.1)
    assert lorainit.Auto(length=0.1, least_gain=0).length == 0.1


def test_it_is_the_default_and_wants_data() -> None:
    torch.manual_seed(5)
    model = lorainit.get_peft_model(llama(), config(r=4), data=sequences(), progress=False)
    assert origin_of(model, "default").settings["method"] == "Auto"
    assert same(adapter(model), adapter(started(lorainit.Auto())))
    with pytest.raises(MissingStatisticError, match=r"Auto needs .*pass data="):
        lorainit.get_peft_model(llama(), config(r=4))


@pytest.mark.parametrize(
    ("result", "gain", "is_share"),
    [
        (SearchResult(1.0, 0.5, 2.0, ((1.0, 0.5), (4.0, 3.0))), 0.75, True),
        (SearchResult(1.0, -2.0, -1.0, ((1.0, -2.0),)), 1.0, False),
        (SearchResult(1.0, -1.1, -1.0, ((1.0, -1.1),)), 0.1, False),
        # It starts above zero, and some length takes it below.
        (SearchResult(1.0, 0.2, 0.3, ((1.0, 0.2), (4.0, -0.5))), 0.1, False),
    ],
)
def test_gains_of_losses_that_may_be_negative_are_differences(
    result: SearchResult, gain: float, is_share: bool
) -> None:
    assert result.gain == pytest.approx(gain)
    assert result.is_share == is_share


def reward(model: Any, batch: Any) -> Tensor:
    """Minus the mean log-odds of the labels: negative where they are likely."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:, None].clamp_min(0))
    return -10 - chosen[..., 0].mean(1)


def test_a_start_is_judged_by_how_much_a_negative_loss_falls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The measured start lowers it by some tenths: enough for 0.01, too little for 0.9."""
    data = [{"input_ids": b["input_ids"], "labels": b["labels"]} for b in sequences()]
    lengths = []
    for least in (0.01, 0.9):
        torch.manual_seed(5)
        with caplog.at_level("INFO", logger="lorainit"):
            model = lorainit.get_peft_model(
                llama(),
                config(r=4),
                method=lorainit.Auto(least_gain=least),
                data=data,
                loss_fn=reward,
                progress=False,
            )
        lengths.append(origin_of(model, "default").measured["length"])
    assert lengths[0] > 0 == lengths[1]
    assert "the measured start would lower the loss by 0." in caplog.text
    assert "less than 0.9" in caplog.text


def preference(model: Any, batch: Any) -> Tensor:
    """DPO, its reference computed by the same model inside the same forward."""

    def ratio(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(1)

    ids = batch["input_ids"]
    with torch.no_grad():
        reference = ratio(ids) - ratio(ids.flip(1))
    return -torch.nn.functional.logsigmoid(ratio(ids) - ratio(ids.flip(1)) - reference)


@pytest.mark.parametrize("method", [lorainit.Natural(), lorainit.Natural(steps=2), lorainit.Auto()])
def test_a_loss_that_never_moves_is_plain_lora_and_said(
    method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{"input_ids": b["input_ids"], "labels": b["labels"]} for b in sequences()]
    torch.manual_seed(5)
    plain = adapter(peft.get_peft_model(llama(), config(r=4)))
    torch.manual_seed(5)
    with caplog.at_level("INFO", logger="lorainit"):
        model = lorainit.get_peft_model(
            llama(), config(r=4), method=method, data=data, loss_fn=preference, progress=False
        )
    assert same(adapter(model), plain)
    assert "the loss on held-back sequences is 0.6931 whatever the start" in caplog.text
    assert "precompute_ref_log_probs" in caplog.text


@pytest.mark.parametrize("gain", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(gain: float) -> None:
    with pytest.raises(ValueError, match="least_gain"):
        lorainit.Auto(least_gain=gain)
