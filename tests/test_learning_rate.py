"""The suggested learning rate: its step is the optimizer's, its losses are the model's, nothing is moved."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorainit
from lorainit.adapters.factors_of import factors_of

from lorainit.calibration.learning_rate import first_minimum, suggested

from lorainit.errors import AdapterError, DataError, MissingStatisticError
from lorainit.types import Factors
from tests.adapters.tiny import config, llama


def sequences(count: int = 16, size: int = 4) -> list[dict[str, Tensor]]:
    """Rising runs of tokens: something to learn."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(0, 6, (count, 1), generator=generator)
    ids = first + torch.arange(10)
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def started(method: Any, **named: Any) -> Any:
    torch.manual_seed(5)
    return lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=sequences(), progress=False, **named
    )


def suggestion(model: Any, data: Any = None, **named: Any) -> lorainit.LearningRate:
    data = sequences() if data is None else data
    return lorainit.suggest_learning_rate(model, data, progress=False, **named)


def mean_loss(model: Any, rows: Tensor) -> Tensor:
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("anchored", [False, True])
def test_the_step_is_that_of_adam(anchored: bool) -> None:
    torch.manual_seed(0)
    a, b, scaling, rate = torch.randn(3, 7), torch.randn(5, 3), 1.7, 1e-2
    weight, target = torch.randn(5, 7), torch.randn(5, 7)
    start_b = b if anchored else torch.zeros_like(b)
    away = scaling * b @ a if anchored else torch.zeros(5, 7)
    pa, pb = (torch.nn.Parameter(t.clone()) for t in (a, start_b))

    def effective() -> Tensor:
        return weight + scaling * pb @ pa - away

    (effective() - target).square().sum().backward()
    optimizer = torch.optim.Adam([pa, pb], lr=rate, eps=1e-20)
    optimizer.step()
    moved = (effective() - weight).detach()
    gradient = 2 * (weight - target)
    term = SignStep.of(Factors(a, b, anchored), scaling, gradient).at(rate)
    torch.testing.assert_close(term.left @ term.right, moved, rtol=1e-4, atol=1e-5)
    # Control: uphill, or without the scaling, it is another step.
    for wrong in (
        SignStep.of(Factors(a, b, anchored), scaling, -gradient),
        SignStep.of(Factors(a, b, anchored), 1.0, gradient),
    ):
        term = wrong.at(rate)
        assert not torch.allclose(term.left @ term.right, moved, atol=1e-3)


@pytest.mark.parametrize("method", [lorainit.Vanilla(), lorainit.PiSSA()])
def test_every_loss_is_that_of_the_model_after_one_step(method: Any) -> None:
    model = started(method)
    found = suggestion(model)
    rows = torch.cat([batch["input_ids"] for batch in sequences()])
    given, held = rows[0::2], rows[1::2]
    stepped = copy.deepcopy(model).eval()
    learned = [p for p in stepped.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(mean_loss(stepped, given), learned)
    first = [p.detach().clone() for p in learned]
    assert found.sequences == len(held)
    assert found.base_loss == pytest.approx(float(mean_loss(stepped, held).detach()), rel=1e-5)
    for rate, loss in found.trials:
        with torch.no_grad():
            for p, start, gradient in zip(learned, first, gradients, strict=True):
                p.copy_(start - rate * gradient.sign())
            expected = float(mean_loss(stepped, held))
        assert loss == pytest.approx(expected, rel=2e-4)
    # Control: the step moves the loss by more than that.
    assert max(loss for _, loss in found.trials) > 1.01 * min(loss for _, loss in found.trials)


def test_short_rows_ask_for_no_higher_rate_than_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run moves them by the rate at every step; the first step alone does not see that."""
    found = {}
    for share in (1.0, 0.05):
        model = started(lorainit.Vanilla())
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.data.mul_(share)
        found[share] = suggestion(model)
    long, short = found[1.0], found[0.05]
    assert len(short.trials) == len(long.trials)
    assert long.one_step / 2 < short.one_step < 2 * long.one_step

    def first(rate: lorainit.LearningRate) -> float:
        """What the step at the lowest rate takes off the loss, per rate."""
        lowest, loss = rate.trials[0]
        return (rate.base_loss - loss) / lowest

    assert first(short) > 0.3 * first(long)
    # Control: their own first step is a twentieth as long.
    monkeypatch.setattr(sign_step, "LEAST_ROW", 0.0)
    assert first(suggestion(model)) < 0.1 * first(long)


def test_a_step_of_short_rows_is_that_of_rows_with_signs_added() -> None:
    """From the gradient at the longer rows; of the length asked for in the mean square."""
    gradient = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    short = torch.randn(2, 400, generator=torch.Generator().manual_seed(1)) * 0.01
    step = SignStep.of(Factors(short, torch.ones(3, 2), False), 1.0, gradient)
    rows = step.factors.A
    assert float(rows.square().sum() / 2) == pytest.approx(LEAST_ROW**2, rel=0.1)
    added = rows - short
    assert torch.allclose(added.abs(), added.abs().mean(), rtol=1e-4)
    assert abs(float(added.sign().mean())) < 0.1
    assert torch.equal(step.sign_b, torch.sign(gradient @ rows.mT))
    again = SignStep.of(Factors(short, torch.ones(3, 2), False), 1.0, gradient)
    assert torch.equal(again.factors.A, rows)


def test_zero_rows_stay_and_count_for_nothing() -> None:
    gradient = torch.randn(3, 400, generator=torch.Generator().manual_seed(0))
    short = torch.randn(3, 400, generator=torch.Generator().manual_seed(1)) * 0.01
    short[1] = 0
    rows = SignStep.of(Factors(short, torch.ones(3, 3), False), 1.0, gradient).factors.A
    assert not rows[1].any()
    assert float(rows.square().sum() / 2) == pytest.approx(LEAST_ROW**2, rel=0.1)


def test_a_short_row_along_which_the_loss_is_steep_asks_for_no_lower_rate() -> None:
    """Lengthened along itself its step would be as many times as long there."""
    steep = torch.zeros(1, 400)
    steep[0, 0] = 0.05
    gradient = torch.zeros(3, 400)
    gradient[:, 0] = 1.0
    step = SignStep.of(Factors(steep, torch.zeros(3, 1), False), 1.0, gradient)
    moved = step.at(1e-3)
    along = float((moved.left @ moved.right)[:, 0].abs().max())
    assert along < 2 * 1e-3 * 0.05
    assert along > 0.2 * 1e-3 * 0.05


def test_long_rows_and_anchored_factors_are_as_they_are() -> None:
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    small, large, none = torch.ones(2, 4) * 0.01, torch.ones(2, 4), torch.zeros(2, 4)
    for a, anchored, kept in (
        (small, True, True), (large, False, True), (none, False, True), (small, False, False),
    ):  # fmt: skip
        step = SignStep.of(Factors(a, torch.ones(3, 2), anchored), 1.0, gradient)
        assert torch.equal(step.factors.A, a) == kept


def test_the_first_of_two_minima() -> None:
    def loss(rate: float) -> float:
        x = math.log(rate)
        near, far = (x - math.log(3e-4)) ** 2, (x - math.log(1e-2)) ** 2
        return 4 - 1.5 * math.exp(-near) - 2 * math.exp(-far)

    found, trials = first_minimum(loss, 4.0)
    assert found == pytest.approx(3e-4, rel=0.15)
    # Control: the other one is lower.
    assert loss(1e-2) < loss(3e-4)
    assert len(trials) <= 14
    assert found < suggested(found) < 10 * found


@pytest.mark.parametrize("least", [1e-6, 4e-5, 1e-3, 3e-2])
def test_a_minimum_is_found_wherever_it_is(least: float) -> None:
    def loss(rate: float) -> float:
        return 1 + (math.log(rate / least) / 4) ** 2 if rate < 5 * least else math.nan

    found, trials = first_minimum(loss, 1.5)
    assert found == pytest.approx(least, rel=0.3)
    assert len(trials) <= 14


def test_where_nothing_helps_there_is_none() -> None:
    assert first_minimum(lambda rate: 2.0 + rate, 2.0)[0] is None
    assert first_minimum(lambda rate: 2.0, math.nan)[0] is None


def test_where_every_step_leads_upwards_none_is_suggested() -> None:
    """The held-back half wants the opposite of the other: what lowers one's loss raises the other's."""

    def opposed(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1].mT
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
        return torch.where(ids[:, 0] == 1, losses, 8 - losses)

    def alternating(second: int) -> list[dict[str, Tensor]]:
        ids = torch.arange(10).repeat(16, 1)
        ids[0::2, 0], ids[1::2, 0] = 1, second
        return [{"input_ids": ids}]

    model = started(lorainit.Vanilla())
    with pytest.raises(DataError, match="no learning rate can be suggested"):
        suggestion(model, alternating(2), loss_fn=opposed)
    assert suggestion(model, alternating(1), loss_fn=opposed).value > 0


def test_the_batching_does_not_matter() -> None:
    model = started(lorainit.EVA())
    one = suggestion(model, sequences(size=1))
    many = suggestion(model, sequences(size=8))
    assert many.one_step == pytest.approx(one.one_step, rel=1e-3)
    assert many.sequences == one.sequences == 8


def test_nothing_is_moved() -> None:
    model = started(lorainit.Natural())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    output = model(**sequences()[0]).loss
    suggestion(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert torch.equal(output, model(**sequences()[0]).loss)


def test_any_adapter_of_peft_has_a_rate_and_a_larger_one_a_smaller_rate() -> None:
    torch.manual_seed(5)
    model = peft.get_peft_model(llama(), config(r=4))
    first = suggestion(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter *= 8
    second = suggestion(model)
    # Rows eight times as long: the same step at an eighth of the rate.
    assert second.one_step == pytest.approx(first.one_step / 8, rel=0.1)


def test_the_factors_are_those_that_are_trained() -> None:
    model = started(lorainit.PiSSA())
    for name, pair in factors_of(model, "default").items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert pair.anchored
        assert pair.A.shape[0] == pair.B.shape[1] == 4
        # Twice the rank to PEFT, of which the first half is trained.
        assert torch.equal(pair.A, layer.lora_A["default"].weight[:4])
        assert torch.equal(pair.B, layer.lora_B["default"].weight[:, :4])


def test_with_the_start(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lorainit"):
        model = started(lorainit.EVA(), suggest_rate=True)
    line = next(text for text in caplog.messages if text.startswith("EVA: "))
    found = suggestion(model)
    measured = model.peft_config["default"].origin.measured
    assert measured["learning_rate"] == pytest.approx(found.value, rel=1e-6)
    assert f"learning rate {found.value:.2g}" in line
    plain = started(lorainit.EVA())
    for (name, one), (_, other) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    assert "learning_rate" not in plain.peft_config["default"].origin.measured
    model.save_pretrained(str(tmp_path))
    loaded = lorainit.load_adapter(llama(), tmp_path)
    assert loaded.peft_config["default"].origin.measured["learning_rate"] == found.value


def test_plain_lora_draws_the_same_numbers_with_it() -> None:
    with_rate, plain = started(lorainit.Vanilla(), suggest_rate=True), started(lorainit.Vanilla())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in with_rate.state_dict().items())


def test_what_cannot_be_done_is_said_first() -> None:
    with pytest.raises(AdapterError, match="no LoRA adapter 'other'"):
        suggestion(started(lorainit.Vanilla()), adapter_name="other")
    with pytest.raises(AdapterError, match="it has none"):
        suggestion(llama())
    with pytest.raises(MissingStatisticError, match="suggest_rate=True"):
        lorainit.get_peft_model(
            llama(), config(r=4), method=lorainit.PiSSA(), suggest_rate=True, progress=False
        )


def classifier(learning_rate: float | None = None, **named: Any) -> Any:
    torch.manual_seed(7)
    small = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2, pad_token_id=0,
    )  # fmt: skip
    return lorainit.get_peft_model(
        LlamaForSequenceClassification(small),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **named),
        method=lorainit.Vanilla(),
        data=labelled(),
        suggest_rate=True,
        learning_rate=learning_rate,
        progress=False,
    )


def labelled() -> list[dict[str, Tensor]]:
    """One class alone: something that any step can learn."""
    ids = torch.randint(1, 32, (32, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "labels": torch.ones_like(part[:, 0])} for part in ids.split(8)]


def test_beside_a_head_that_is_trained_none_is_suggested(caplog: pytest.LogCaptureFixture) -> None:
    """A start does not fail for it; under a head that stays as it is there is one."""
    with caplog.at_level("INFO", logger="lorainit"):
        model = classifier(task_type="SEQ_CLS")
    said = "No learning rate can be suggested for an adapter with a head of its own ('score')"
    assert any(said in line for line in caplog.messages)
    assert "learning_rate" not in model.peft_config["default"].origin.measured
    with pytest.raises(DataError, match=r"with a head of its own \('score'\)"):
        suggestion(model, labelled())
    assert suggestion(classifier(), labelled()).value > 0
