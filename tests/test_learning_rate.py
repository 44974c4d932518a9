"""The suggested learning rate: its step is the optimizer's, its losses are the model's, nothing is moved."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorainit
from lorainit.adapters.factors_of import factors_of
from lorainit.calibration.adam_steps import AdamSteps, clip
from lorainit.calibration.learning_rate import best_rate, suggested
from lorainit.errors import AdapterError, DataError, MissingStatisticError, NonFiniteError
from lorainit.pipeline.first_steps import FirstSteps
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


def adamw(parameters: list[Any], steps: Any) -> None:
    """Two steps of torch's own, with clipping, as a trainer takes them."""
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    for loss, rate in steps:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


@pytest.mark.parametrize("start", ["plain", "moved", "anchored"])
@pytest.mark.parametrize("steep", [1e-3, 10.0])
def test_the_two_steps_are_those_of_adam(start: str, steep: float) -> None:
    torch.manual_seed(0)
    a, b, scaling, rate = torch.randn(3, 7), torch.randn(5, 3), 1.7, 1e-2
    b, anchored = (torch.zeros_like(b) if start == "plain" else b), start == "anchored"
    weight, targets = torch.randn(5, 7), torch.randn(2, 5, 7)
    pa, pb = (torch.nn.Parameter(t.clone()) for t in (a, b))

    def effective() -> Tensor:
        away = scaling * b @ a if anchored else 0.0
        return weight + scaling * pb @ pa - away

    def loss(batch: int) -> Tensor:
        return steep * (effective() - targets[batch]).square().sum()

    steps = AdamSteps(Factors(a, b, anchored), scaling)

    def gradient(batch: int, at: Factors) -> Any:
        term = steps.term(at)
        moved = weight + term.left @ term.right
        found = steps.gradient(2 * steep * (moved - targets[batch]), at)
        clip({"": found})
        return found

    # Unclipped it is autograd's, the scaling included.
    truth = torch.autograd.grad(loss(0), [pa, pb])
    weight_gradient = 2 * steep * (effective().detach() - targets[0])
    for one, other in zip(steps.gradient(weight_gradient, steps.start), truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    first = gradient(0, steps.start)
    second = gradient(1, steps.after_one(rate, first))
    adamw([pa, pb], [(lambda: loss(0), 0.2 * rate), (lambda: loss(1), 0.4 * rate)])
    found = steps.after_two(rate, first, second)
    torch.testing.assert_close(found.A, pa.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.B, pb.detach(), rtol=1e-5, atol=1e-6)
    term = steps.term(found)
    torch.testing.assert_close(
        weight + term.left @ term.right, effective().detach(), rtol=1e-4, atol=1e-5
    )
    # Control: with the first gradient in the second's place it is another step.
    other = steps.after_two(rate, first, first)
    assert not torch.allclose(other.B, pb.detach(), atol=1e-4)


def test_gradients_are_clipped_together() -> None:
    pairs = {n: (torch.full((2, 2), 3.0), torch.full((2, 2), 4.0)) for n in ("one", "other")}
    clip(pairs)
    norm = math.sqrt(sum(float(h.square().sum()) for pair in pairs.values() for h in pair))
    assert norm == pytest.approx(1.0)
    assert float(pairs["one"][0][0, 0] / pairs["other"][1][0, 0]) == pytest.approx(0.75)
    small = {"one": (torch.full((2, 2), 0.1), torch.zeros(2, 2))}
    clip(small)
    assert torch.equal(small["one"][0], torch.full((2, 2), 0.1))


METHODS = [
    lorainit.Vanilla(),
    lorainit.PiSSA(),
    lorainit.LoraDA(population=16),
    lorainit.Natural(),
    lorainit.LoraDA(population=16, scale="calibrated"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_loss_is_that_of_the_model_after_two_steps(method: Any) -> None:
    """From where the start puts the model; where its length was measured, from the base with its rows."""
    model = started(method)
    found = suggestion(model)
    rows = torch.cat([batch["input_ids"] for batch in sequences()])
    held, given = rows[1::2], rows[0::2]
    first = copy.deepcopy(model).eval()
    if "start_loss" in model.peft_config["default"].origin.measured:
        for name, weight in first.named_parameters():
            if "lora_B" in name:
                assert weight.data.any()
                weight.data.zero_()
    assert found.sequences == len(held)
    expected = float(mean_loss(first, held).detach())
    assert found.start_loss == pytest.approx(expected, rel=1e-5)
    for rate, loss in found.trials:
        stepped = copy.deepcopy(first)
        learned = [p for p in stepped.parameters() if p.requires_grad]
        parts = ((given[0::2], 0.2 * rate), (given[1::2], 0.4 * rate))
        adamw(learned, [(lambda r=part: mean_loss(stepped, r), by) for part, by in parts])  # noqa: B023
        assert loss == pytest.approx(float(mean_loss(stepped, held).detach()), rel=2e-4)
    # Control: the steps move the loss by more than that.
    assert max(loss for _, loss in found.trials) > 1.01 * min(loss for _, loss in found.trials)


def test_a_step_too_long_for_a_second_gradient_is_only_a_bad_rate() -> None:
    """The loss is infinite where it is above all of the base's, as half-precision's is where it overflows."""
    cap = math.inf

    def cut(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].mT
        losses = torch.nn.functional.cross_entropy(
            logits, batch["input_ids"][:, 1:], reduction="none"
        ).mean(1)
        return torch.where(losses < cap, losses, torch.inf)

    model = started(lorainit.Vanilla())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight *= 1000
        cap = 1.001 * max(float(cut(model, batch).max()) for batch in sequences())
    found = suggestion(model, loss_fn=cut)
    assert math.inf in [loss for _, loss in found.trials]
    assert found.value > 0


def test_a_gradient_that_overflows_is_only_a_bad_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is finite and its gradient in half precision is not."""
    model = started(lorainit.Vanilla())
    truth = dict(suggestion(model).trials)
    work, taken = FirstSteps.gradients, []

    def overflowing(self: FirstSteps, step: int, at: Any) -> Any:
        taken.append(step)
        if len(taken) == 4:
            raise NonFiniteError("layer 'x': gradient is not finite")
        return work(self, step, at)

    monkeypatch.setattr(FirstSteps, "gradients", overflowing)
    found = dict(suggestion(model).trials)
    assert taken[:4] == [0, 1, 1, 1]
    third = sorted(r for r in found if r >= 8e-5 * 0.99)[2]
    assert found[third] == math.inf
    shared = [rate for rate in found if rate in truth and rate != third]
    assert [found[rate] for rate in shared] == [truth[rate] for rate in shared]
    # Control: at the start it is an error of the data.
    taken[:] = [0, 0, 0]
    with pytest.raises(NonFiniteError):
        suggestion(model)


class TwoWays(nn.Module):
    """A sequence that begins with 1 goes through one layer, others through the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(32, 16)
        self.seldom, self.often, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = []
        for row in self.words(input_ids).unbind():
            way = self.seldom if torch.equal(row[0], self.words.weight[1]) else self.often
            rows.append(self.head(row + way(row)))
        return torch.stack(rows)


def next_word(model: Any, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    losses = torch.nn.functional.cross_entropy(
        model(input_ids=ids)[:, :-1].mT, ids[:, 1:], reduction="none"
    )
    return losses.mean(1)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("names", [["seldom", "often"], ["seldom"]])
def test_a_layer_that_few_sequences_reach_is_no_error(row: int, names: list[str]) -> None:
    """Each step sees a quarter of them; a start that all of its layers were reached for stands."""
    rows = 2 + torch.arange(10).repeat(16, 1)
    rows[row, 0] = 1
    data = [{"input_ids": part} for part in rows.split(4)]
    model = lorainit.get_peft_model(
        TwoWays(), peft.LoraConfig(r=2, target_modules=names), method=lorainit.LoraGA(), data=data,
        suggest_rate=True, loss_fn=next_word, on_unused="raise", progress=False,
    )  # fmt: skip
    measured = model.peft_config["default"].origin.measured
    # Where nothing that is measured on changes, no rate is better than another.
    assert ("learning_rate" in measured) == (names == ["seldom", "often"])
    if "learning_rate" in measured:
        # The other layer's gradients are there all the same.
        same = suggestion(model, data, loss_fn=next_word)
        assert measured["learning_rate_trials"] == [list(trial) for trial in same.trials]


def test_sequences_that_are_skipped_do_not_make_every_rate_bad() -> None:
    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1].mT
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)
        return torch.where(ids[:, 0] == 31, torch.inf, losses)

    model = started(lorainit.Vanilla())
    data = sequences()
    data[0]["input_ids"][2, 0] = 31  # of the second gradient
    found = suggestion(model, data, loss_fn=loss_fn, on_nonfinite="skip")
    assert all(math.isfinite(loss) for _, loss in found.trials)
    with pytest.raises(DataError):
        suggestion(model, data, loss_fn=loss_fn)


def test_a_start_of_measured_length_that_was_trained_steps_from_where_it_is() -> None:
    model = started(lorainit.Natural())
    held = torch.cat([batch["input_ids"] for batch in sequences()])[1::2]
    base = suggestion(model).start_loss
    with model.disable_adapter():
        assert base == pytest.approx(float(mean_loss(model.eval(), held)), rel=1e-5)
    # Resized for another rate it is still that start.
    lorainit.match_learning_rate(model, 1e-2, 1e-3)
    assert suggestion(model).start_loss == pytest.approx(base, rel=1e-5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(1.1)
    here = float(mean_loss(model.eval(), held).detach())
    assert suggestion(model).start_loss == pytest.approx(here, rel=1e-5)
    assert here != pytest.approx(base, rel=1e-3)


def test_factors_that_are_not_there_are_said() -> None:
    model = started(lorainit.Vanilla())
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A)
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.to("meta"))
    with pytest.raises(AdapterError, match="on the meta device, and no learning rate"):
        suggestion(model)


def test_an_anchored_move_is_not_lost_in_half_precision() -> None:
    """Large factors, and a small step of them: the difference of two large products would be rounding."""
    torch.manual_seed(0)
    a, b = 10 * torch.randn(4, 32), 10 * torch.randn(16, 4)
    steps = AdamSteps(Factors(a, b, True), 1.0)
    moved = Factors(
        a + 1e-2 * torch.randn(4, 32).sign(), b + 1e-2 * torch.randn(16, 4).sign(), True
    )
    truth = (moved.B.double() @ moved.A.double()) - (b.double() @ a.double())
    term = steps.term(moved)
    found = term.left.bfloat16().double() @ term.right.bfloat16().double()
    assert (found - truth).norm() < 0.02 * truth.norm()
    # Control: as the difference of the two products.
    left, right = torch.cat([moved.B, -b], dim=1), torch.cat([moved.A, a])
    other = left.bfloat16().double() @ right.bfloat16().double()
    assert (other - truth).norm() > 0.1 * truth.norm()


def test_short_rows_ask_for_no_much_higher_rate_than_long_ones() -> None:
    """The second step moves them by the rate, however short they are."""
    found = {}
    for share in (1.0, 0.02):
        model = started(lorainit.Vanilla())
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.data.mul_(share)
        found[share] = suggestion(model)
    long, short = found[1.0], found[0.02]
    assert long.two_steps / 2 < short.two_steps < 4 * long.two_steps


def test_one_sequence_a_half_gives_both_gradients() -> None:
    """Two sequences are enough: one to step on, twice, and one to measure on."""
    model = started(lorainit.Vanilla())
    found = suggestion(model, sequences(2))
    rows = torch.cat([batch["input_ids"] for batch in sequences(2)])
    assert found.sequences == 1
    stepped = copy.deepcopy(model).eval()
    learned = [p for p in stepped.parameters() if p.requires_grad]
    rate, loss = found.trials[0]
    same = lambda: mean_loss(stepped, rows[:1])  # noqa: E731
    adamw(learned, [(same, 0.2 * rate), (same, 0.4 * rate)])
    assert loss == pytest.approx(float(mean_loss(stepped, rows[1:]).detach()), rel=2e-4)


def test_the_lower_of_two_minima() -> None:
    """One step has a near one that nothing comes of; two steps tell it from the other."""

    def loss(rate: float) -> float:
        x = math.log(rate)
        near, far = (x - math.log(8e-5)) ** 2, (x - math.log(5e-3)) ** 2
        return 4 - 1.5 * math.exp(-near) - 2 * math.exp(-far)

    found, trials = best_rate(loss, 4.0)
    assert found == pytest.approx(5e-3, rel=0.3)
    assert len(trials) <= 7
    assert suggested(5e-4) < suggested(found) < found


@pytest.mark.parametrize("least", [1e-6, 4e-5, 1e-3, 3e-2, 0.3])
def test_a_minimum_is_found_wherever_it_is(least: float) -> None:
    def loss(rate: float) -> float:
        away = math.log(rate / least) / 4
        return 1.5 - 0.5 * math.exp(-(away**2)) if rate < 8 * least else math.nan

    found, trials = best_rate(loss, 1.5)
    assert found == pytest.approx(least, rel=0.5)
    assert len(trials) <= 11


def test_where_nothing_helps_there_is_none() -> None:
    assert best_rate(lambda rate: 2.0 + rate, 2.0)[0] is None
    assert best_rate(lambda rate: 2.0, math.nan)[0] is None


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
    assert many.two_steps == pytest.approx(one.two_steps, rel=1e-3)
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
    # Rows eight times as long: nearly the same steps at an eighth of the rate.
    assert second.two_steps == pytest.approx(first.two_steps / 8, rel=0.25)


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
