"""New heads beside an adapter: fitted in its own copies, before the statistics, and nothing else changed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.calibration.fit_heads import PART
from lorainit.data.batch import Batch
from lorainit.data.sampling import Sample
from lorainit.pipeline.heads import _numbers
from lorainit.pipeline.measurements import Measurements
from tests.pipeline.classifiers import classifier, config, labelled
from tests.untouched import untouched

NATURAL = lorainit.Natural(trust_region=10.0)


def started(model: Any, kind: str = "classes", **named: Any) -> Any:
    torch.manual_seed(5)
    named = {"method": lorainit.Vanilla(), "data": labelled(kind, 100, 25)} | named
    return lorainit.get_peft_model(
        model, named.pop("config", config(kind)), progress=False, **named
    )


def own_head(model: Any, name: str = "classifier") -> Any:
    return model.get_base_model().get_submodule(name).modules_to_save["default"]


def weights(head: Any) -> list[Tensor]:
    return [head.weight.detach().clone(), head.bias.detach().clone()]


def loss_of(model: Any, kind: str) -> float:
    """The model's own, on data that no start has seen."""
    with torch.no_grad():
        return sum(float(model(**b).loss) for b in labelled(kind, 96, 32, seed=4)) / 3


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "tags"])
def test_plain_lora_begins_with_a_fitted_head(kind: str) -> None:
    before = loss_of(classifier(kind), kind)
    base = classifier(kind)
    bits = copy.deepcopy(base.state_dict())
    model = started(base, kind)
    heads = origin_of(model, "default").heads
    assert heads["fitted"] == ["classifier"]
    assert heads["loss_after"] < heads["loss_before"]
    assert heads["sequences"] == 20
    assert loss_of(model.eval(), kind) < 0.95 * before
    # All else is the plain PEFT run with the same seed, and its random numbers go on as there.
    after = torch.rand(3)
    torch.manual_seed(5)
    plain = peft.get_peft_model(classifier(kind), config(kind))
    assert torch.equal(torch.rand(3), after)
    other = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, other[name])
        assert same != ("modules_to_save" in name), name
        assert parameter.requires_grad == other[name].requires_grad
    with model.disable_adapter():
        assert loss_of(model, kind) == pytest.approx(before, rel=1e-12)
    original = model.get_base_model().classifier.original_module
    assert torch.equal(original.weight, bits["classifier.weight"])


def test_statistics_are_those_of_a_model_whose_head_was_replaced_by_hand() -> None:
    model = started(classifier(), method=NATURAL)
    by_hand = classifier()
    with torch.no_grad():
        by_hand.classifier.weight.copy_(own_head(model).weight)
        by_hand.classifier.bias.copy_(own_head(model).bias)
    other = started(by_hand, method=NATURAL, fit_heads=False)
    without = started(classifier(), method=NATURAL, fit_heads=False)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
    found, same, random = (dict(m.named_parameters())[key] for m in (model, other, without))
    assert float(found.detach().norm()) > 0
    assert torch.equal(found, same)
    assert not torch.allclose(found, random, rtol=0.1)
    measured = [origin_of(m, "default").measured["base_loss"] for m in (model, other, without)]
    assert measured[0] == measured[1] < measured[2]
    assert measured[0] == pytest.approx(origin_of(model, "default").heads["loss_after"], rel=1e-5)


def test_a_head_without_anything_to_learn_is_left_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = classifier("noise")
    with caplog.at_level("INFO", logger="lorainit"):
        found = started(model, "noise")
    assert torch.equal(
        own_head(found).weight, found.get_base_model().classifier.original_module.weight
    )
    assert origin_of(found, "default").heads["fitted"] == []
    line = next(text for text in caplog.messages if text.startswith("Vanilla: "))
    assert "head 'classifier' left as it is: fitted, the loss on 20 held-back sequences" in line
    assert "standard error" in line
    with caplog.at_level("INFO", logger="lorainit"):
        heads = origin_of(started(classifier()), "default").heads
    said = f"loss {heads['loss_before']:.4g} to {heads['loss_after']:.4g} on 20"
    assert f"head 'classifier' fitted first, {said}" in caplog.messages[-1]
    assert heads["loss_after"] < 0.25 < heads["loss_before"]


def test_a_head_that_is_trained_already_stays_near_itself() -> None:
    """The decay goes toward the present weights, so what the head knows is not forgotten."""
    first = started(classifier())
    trained = classifier()
    with torch.no_grad():
        trained.classifier.weight.copy_(own_head(first).weight)
        trained.classifier.bias.copy_(own_head(first).bias)
    again = origin_of(started(trained), "default").heads
    new = origin_of(first, "default").heads
    assert again["loss_before"] - again["loss_after"] < 0.5 * (
        new["loss_before"] - new["loss_after"]
    )


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "tags"])
def test_a_head_of_classes_goes_a_part_of_the_way_and_one_of_numbers_all_of_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = weights(own_head(started(classifier(kind), kind)))
    monkeypatch.setattr("lorainit.pipeline.heads.PART", 1.0)
    whole = weights(own_head(started(classifier(kind), kind)))
    present = weights(classifier(kind).classifier)
    share = 1.0 if kind == "numbers" else PART
    expected = present[0] + share * (whole[0] - present[0])
    assert torch.allclose(taken[0], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(taken[1], whole[1]) == (kind == "numbers")


def test_what_counts_as_a_number() -> None:
    """Zeros and ones, classes and their probabilities do not; whatever else lies on a line does."""

    def numbers(labels: Tensor) -> bool:
        batch = Batch.arrived({"input_ids": torch.ones(len(labels), 3).long(), "labels": labels}, 0)
        return _numbers(Sample([batch]))

    assert not numbers(torch.tensor([0, 2, 1]))
    assert not numbers(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert not numbers(torch.tensor([[0.0, 1.0], [-100.0, 1.0]]))
    assert not numbers(torch.tensor([[0.2, 0.8], [0.55, 0.45]]))
    assert not numbers(torch.tensor([[0.2, 0.5, 0.3]]).half())
    assert numbers(torch.tensor([0.2, 0.8]))
    assert numbers(torch.tensor([[0.2], [1.0]]))
    assert numbers(torch.tensor([[0.2, 0.7], [0.55, 0.45]]))
    assert numbers(torch.tensor([[-0.5, 1.5]]))


def test_heads_see_four_times_what_statistics_see() -> None:
    counts = {}
    for cap in (25, 30, 100, None):
        model = started(classifier(), method=lorainit.LoraOne(), max_sequences=cap)
        origin = origin_of(model, "default")
        counts[cap] = origin.heads["sequences"], origin.measured["data_sequences"]
        if cap == 25:
            by_hand = classifier()
            with torch.no_grad():
                by_hand.classifier.weight.copy_(own_head(model).weight)
                by_hand.classifier.bias.copy_(own_head(model).bias)
            first = labelled("classes", 100, 25)[:1]
            other = started(by_hand, method=lorainit.LoraOne(), fit_heads=False, data=first)
            for own, its in zip(model.parameters(), other.parameters(), strict=True):
                # But for the base's head, which is that of by hand in one of them.
                assert not own.requires_grad or torch.equal(own, its)
    # A fifth is held back of 100, and the data have no more.
    assert counts == {25: (20, 25.0), 30: (20, 30.0), 100: (20, 100.0), None: (20, 100.0)}
    assert origin_of(started(classifier(), max_sequences=10), "default").heads["sequences"] == 8


def test_the_default_takes_no_step_where_a_head_was_fitted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are statistics collected for one; plain LoRA with that head, by PEFT's own random numbers."""
    auto = lorainit.Auto(trust_region=10.0)
    started_by_step = started(classifier(), method=auto, fit_heads=False)
    assert "start_loss" in origin_of(started_by_step, "default").measured
    collected = []
    kept = Measurements.planned
    monkeypatch.setattr(
        Measurements, "planned", lambda *a, **k: collected.append(1) or kept(*a, **k)
    )
    with caplog.at_level("INFO", logger="lorainit"):
        model = started(classifier(), method=auto)
    assert not collected
    assert "Auto: plain LoRA: a head was fitted first" in caplog.messages[-1]
    plain = started(classifier())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    # What is told to take it takes it, and a head that was left as it is does not keep it from being taken.
    assert "start_loss" in origin_of(started(classifier(), method=NATURAL), "default").measured
    trained = started(classifier(), "noise", method=auto)
    assert collected
    assert origin_of(trained, "default").heads["fitted"] == []


def test_an_adapter_that_exists_gets_plain_factors_beside_a_fitted_head() -> None:
    model = started(classifier(), method=NATURAL, fit_heads=False)
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight"
    assert dict(model.named_parameters())[key].detach().any()
    data = labelled("classes", 100, 25)
    lorainit.get_peft_model(model, None, method=lorainit.Auto(), data=data, progress=False)
    assert origin_of(model, "default").heads["fitted"] == ["classifier"]
    assert not dict(model.named_parameters())[key].detach().any()


def test_what_quantization_took_is_given_back_beside_a_fitted_head() -> None:
    full, rounded = classifier(), classifier()
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear) and "encoder" in name:
                step = module.weight.abs().amax() / 2
                module.weight.copy_((module.weight / step).round() * step)
    model = started(rounded, method=lorainit.Auto(), reference_weights=full)
    origin = origin_of(model, "default")
    assert origin.heads["fitted"] == ["classifier"]
    assert origin.measured["base_loss"] > origin.measured["start_loss"]


def test_what_switches_it_off() -> None:
    """No data, statistics, the argument, a head that nobody trains, labels that are missing."""
    statistics = lorainit.collect_statistics(
        classifier(), config(), data=labelled("classes"), needs=NATURAL.needs, progress=False
    )
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in labelled("classes")]
    for named in (
        {"data": None},
        {"method": lorainit.EVA(rho=1.0), "data": unlabelled},
        {"statistics": statistics, "data": None, "method": lorainit.LoraOne()},
        {"statistics": statistics, "method": NATURAL},
        {"fit_heads": False},
        {"data": labelled("classes", 1)},
    ):
        model = started(classifier(), **named)
        assert origin_of(model, "default").heads == {}
        assert torch.equal(own_head(model).weight, classifier().classifier.weight)
    frozen = peft.LoraConfig(r=2, target_modules=["query"])
    assert origin_of(started(classifier(), config=frozen), "default").heads == {}


def test_heads_over_a_vocabulary_are_left_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    from tests.statistics.models import llama, sequences

    data = [{k: v.unsqueeze(0) for k, v in row.items()} for row in sequences(10)]
    for size, tried in ((4097, False), (37, True)):
        caplog.clear()
        settings = peft.LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
        )
        with caplog.at_level("INFO", logger="lorainit"):
            model = lorainit.get_peft_model(
                llama(vocab_size=size),
                settings,
                method=lorainit.Vanilla(),
                data=data,
                progress=False,
            )
        assert (origin_of(model, "default").heads != {}) == tried
        assert ("head" in caplog.text) == tried


def test_the_model_is_as_it_was_after_an_error_in_the_statistics() -> None:
    class Odd(lorainit.LoraOne):
        def solve(self, *args: Any, **named: Any) -> Any:
            raise RuntimeError("not today")

    model = classifier()
    with untouched(model), pytest.raises(RuntimeError, match="not today"):
        lorainit.get_peft_model(
            model, config(), method=Odd(), data=labelled("classes", 100, 25), progress=False
        )


def test_an_adapter_that_exists_keeps_its_head_when_it_fails(monkeypatch: Any) -> None:
    model = started(classifier(), fit_heads=False)
    before = weights(own_head(model))

    def failing(*args: Any, **named: Any) -> None:
        raise RuntimeError("no line")

    monkeypatch.setattr(sys.modules[lorainit.get_peft_model.__module__], "report_line", failing)
    with pytest.raises(RuntimeError, match="no line"):
        lorainit.get_peft_model(
            model,
            None,
            method=lorainit.Vanilla(),
            data=labelled("classes", 100, 25),
            progress=False,
        )
    assert all(map(torch.equal, weights(own_head(model)), before))
    monkeypatch.undo()
    lorainit.get_peft_model(
        model, None, method=lorainit.Vanilla(), data=labelled("classes", 100, 25), progress=False
    )
    fitted = weights(own_head(model))
    assert not any(map(torch.equal, fitted, before))
    assert all(map(torch.equal, fitted, weights(own_head(started(classifier())))))


def test_starting_again_sees_the_adapters_own_head() -> None:
    """Its copy is what will be trained, so statistics are taken with it whether it is fitted again or not."""
    model = started(classifier())
    data = labelled("noise", 100, 25)
    lorainit.get_peft_model(model, None, method=NATURAL, data=data, progress=False)
    by_hand = classifier()
    with torch.no_grad():
        by_hand.classifier.weight.copy_(own_head(model).weight)
        by_hand.classifier.bias.copy_(own_head(model).bias)
    other = started(by_hand, "noise", method=NATURAL, fit_heads=False, data=data)
    losses = [origin_of(m, "default").measured["base_loss"] for m in (model, other)]
    assert losses[0] == losses[1]


def test_it_is_recorded_saved_and_loaded(tmp_path: Path) -> None:
    model = started(classifier())
    model.save_pretrained(str(tmp_path))
    record = json.loads((tmp_path / "lorainit.json").read_text())
    assert record["heads"]["fitted"] == ["classifier"]
    loaded = lorainit.load_adapter(classifier(), str(tmp_path))
    assert torch.equal(own_head(loaded).weight, own_head(model).weight)
    assert origin_of(loaded, "default").heads == origin_of(model, "default").heads


def test_heads_in_half_precision_are_what_was_measured() -> None:
    model = started(classifier(dtype=torch.bfloat16), method=NATURAL)
    head = own_head(model)
    assert origin_of(model, "default").heads["fitted"] == ["classifier"]
    assert head.weight.dtype == model.get_base_model().classifier.original_module.weight.dtype
