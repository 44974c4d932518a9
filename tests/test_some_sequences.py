"""Lengths of a step are compared on some of many held-back sequences; what is taken is measured on all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.calibration import held_out_loss
from lorainit.calibration.line_search import SearchResult
from lorainit.calibration.paired import Gain
from tests.adapters.tiny import config, llama
from tests.test_refinement import displacement, loss_at, loss_of, moved, sequences


@pytest.fixture
def four_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_loss, "_SEQUENCES", 4)
    monkeypatch.setattr(held_out_loss, "_LABELS", 8)


def test_an_estimate_from_the_first_batches(four_of_many: None) -> None:
    model, data = llama(), sequences()
    terms = displacement(model)
    with loss_at(model, data).measuring() as loss:
        base = loss({})
        some = loss.of_some(base)
        assert len(some.batches) == 1
        assert len(some.latest.losses) == 6
        found, whole = some(terms), loss(terms)
        assert some({}) == base
    there, here = loss_of(moved(model, terms), data[:1]), loss_of(model, data[:1])
    assert found == pytest.approx(base + there - here, rel=1e-5)
    assert found != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(("wanted", "labels"), [(4, 10**6), (19, 8)])
def test_all_where_the_first_do_not_do(
    monkeypatch: pytest.MonkeyPatch, wanted: int, labels: int
) -> None:
    monkeypatch.setattr(held_out_loss, "_SEQUENCES", wanted)
    monkeypatch.setattr(held_out_loss, "_LABELS", labels)
    model = llama()
    with loss_at(model, sequences()).measuring() as loss:
        assert loss.of_some(loss({})) is loss


def started(caplog: pytest.LogCaptureFixture) -> tuple[Any, int]:
    """A start, and how many batches its forward passes ran."""
    model, ran = llama(), list[int]()
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    with caplog.at_level(logging.INFO, logger="lorainit"):
        found = lorainit.get_peft_model(
            model,
            config(r=4),
            method=lorainit.Natural(),
            data=sequences(48),
            calibration_share=0.5,
            progress=False,
        )
    handle.remove()
    return found, len(ran)


def test_what_is_taken_is_measured_on_all(
    four_of_many: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, few = started(caplog)
    result = origin_of(found, "default").measured
    held = [{k: v[1::2] for k, v in batch.items()} for batch in sequences(48)]
    assert result["start_loss"] == pytest.approx(loss_of(found.eval(), held), rel=1e-4)
    with found.disable_adapter():
        assert result["base_loss"] == pytest.approx(loss_of(found, held), rel=1e-4)
    monkeypatch.setattr(held_out_loss, "_LABELS", 10**6)
    other, many = started(caplog)
    assert few < many / 2
    assert origin_of(other, "default").measured["start_loss"] == pytest.approx(
        result["start_loss"], rel=0.1
    )


def test_what_is_clear_on_all_is_taken(
    four_of_many: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six sequences of twenty-four may not tell what all do; and none is taken that all do not tell."""
    wanted = 20
    monkeypatch.setattr(Gain, "clear", property(lambda found: found.sequences >= wanted))
    taken = origin_of(started(caplog)[0], "default").measured
    assert taken["length"] > 0
    assert taken["sequences"] == 24
    wanted = 25
    assert origin_of(started(caplog)[0], "default").measured["length"] == 0


def test_a_gain_that_is_not_clear_on_all_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SearchResult(0.5, 2.0, 4.0, ((0.5, 2.0),), Gain(2.0, 0.1, 5))
    clear = Gain(1.0, 0.1, 50)
    assert (result.on(clear).length, result.on(clear).loss) == (0.5, 3.0)
    monkeypatch.setattr(Gain, "clear", False)
    unclear = result.on(Gain(0.1, 1.0, 50))
    assert (unclear.length, unclear.loss, unclear.gain_by_sequence) == (0.0, 4.0, None)
    assert unclear.unclear is not None
    assert torch.isfinite(torch.tensor(unclear.loss))
