"""A start that a few sequences say little of is shortened, or not taken; one that is clear is as it was."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.calibration.line_search import SearchResult, clear_result
from lorainit.calibration.paired import Gain, SequenceLosses, clearest
from tests.adapters.tiny import config, llama
from tests.test_auto import adapter, same
from tests.test_refinement import sequences

FEW, MANY = 8, 192


def losses(*values: float) -> SequenceLosses:
    return SequenceLosses(torch.tensor(values, dtype=torch.float64), len(values), len(values))


BEFORE = losses(4.0, 4.0, 4.0)
LONG = losses(1.0, 3.0, 4.5)
SHORT = losses(3.5, 3.6, 3.7)
SHORTER = losses(3.8, 3.85, 3.9)
WORSE = losses(4.4, 4.5, 4.6)


def test_the_best_is_taken_where_it_is_clear_and_the_best_of_the_clear_ones_where_not() -> None:
    # In the mean the long step gains most, by 1.17 with a standard error of 1.01.
    place, found = clearest(BEFORE, [SHORTER, LONG, SHORT, WORSE], 1)
    assert place == 2
    assert found.mean == pytest.approx(0.4)
    assert found.error == pytest.approx(0.1 / 3**0.5)
    place, found = clearest(BEFORE, [SHORTER, LONG, SHORT, WORSE], 2)
    assert place == 2
    place, found = clearest(BEFORE, [LONG, WORSE], 0)
    assert place is None
    assert found.mean == pytest.approx(7 / 6)
    assert not found.clear


def test_a_search_ends_at_what_is_clear() -> None:
    trials = ((0.1, 3.85), (1.0, 17 / 6), (0.2, 3.6))
    result = SearchResult(1.0, 17 / 6, 4.0, trials)
    found, place = clear_result(result, BEFORE, [SHORTER, LONG, SHORT])
    assert (found.length, found.loss, place) == (0.2, 3.6, 2)
    assert found.unclear is None
    found, place = clear_result(SearchResult(1.0, 17 / 6, 4.0, trials[1:2]), BEFORE, [LONG])
    assert (found.length, found.loss, place) == (0.0, 4.0, None)
    assert found.unclear is not None
    # Nothing that lowers the loss: there is nothing to be clear of.
    found, place = clear_result(SearchResult(0.0, 4.0, 4.0, ((1.0, 4.5),)), BEFORE, [WORSE])
    assert (found.length, found.unclear, place) == (0.0, None, None)


def started(method: Any, rows: int, seed: int = 3) -> Any:
    torch.manual_seed(5)
    return lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=sequences(rows, seed), progress=False
    )


METHODS = [lorainit.Natural(trust_region=10.0), lorainit.LoraDA(scale="calibrated")]


@pytest.mark.parametrize("method", METHODS, ids=["Natural", "LoraDA"])
def test_of_few_sequences_only_what_is_clear_is_taken(
    method: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And of many it is what it would be if nobody asked."""
    with caplog.at_level(logging.INFO, logger="lorainit"):
        few, many = started(method, FEW), started(method, MANY)
    measured = [origin_of(m, "default").measured for m in (few, many)]
    assert [m["sequences"] for m in measured] == [1, 38]
    assert "gain_error" not in measured[0]
    assert measured[0]["length"] == 0 < measured[1]["length"]
    torch.manual_seed(5)
    plain = lorainit.get_peft_model(llama(), config(r=4), method=lorainit.Vanilla())
    assert same(adapter(few), adapter(plain))
    lines = [t for t in caplog.messages if t.startswith(type(method).__name__)]
    assert "on 1 held-back sequences, too few to tell" in lines[0]
    assert lines[1].endswith(" on 38 sequences")
    monkeypatch.setattr(Gain, "clear", True)
    assert same(adapter(started(method, MANY)), adapter(many))
    # Had nobody asked, the few would have moved the model.
    assert not same(adapter(started(method, FEW)), adapter(plain))


def noise(seed: int, rows: int = 30) -> list[dict[str, Tensor]]:
    """Random tokens: there is nothing to learn, and what a few sequences seem to gain is chance."""
    ids = torch.randint(1, 60, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[i : i + 6], "labels": ids[i : i + 6]} for i in range(0, rows, 6)]


@pytest.mark.parametrize("seed", [2, 4, 6])
def test_a_gain_by_chance_is_not_taken(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def length() -> float:
        model = lorainit.get_peft_model(
            llama(), config(r=4), method=METHODS[0], data=noise(seed), progress=False
        )
        measured = origin_of(model, "default").measured
        assert measured["sequences"] == 6
        return measured["length"]

    assert length() == 0
    monkeypatch.setattr(Gain, "clear", True)
    assert length() > 0


def test_later_steps_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are clear one by one are taken; the record tells how many sequences the whole rests on."""
    several = started(lorainit.Natural(steps=2, trust_region=10.0), MANY)
    measured = origin_of(several, "default").measured
    assert measured["sequences"] == 38
    assert 0 < 2 * measured["gain_error"] < measured["base_loss"] - measured["start_loss"]
