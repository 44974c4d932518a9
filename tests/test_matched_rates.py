"""The rates that are known of an adapter that was matched to one: its record's, and one measured anew."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorainit
from lorainit.adapters.origin import remember_measured
from tests.adapters import tiny
from tests.test_learning_rate import started, suggestion
from tests.test_match_learning_rate import METHODS


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_record_is_of_the_adapter_as_it_is(by_hand: bool, tmp_path: Path) -> None:
    """Which `lorainit train`, the card and a report read: the same whether matched with the start or later."""
    with_start = started(lorainit.PiSSA(), learning_rate=1e-4)
    later = started(lorainit.PiSSA(), suggest_rate=True)
    known = later.peft_config["default"].origin.measured
    if by_hand:
        # In two steps, the first of which is said in the user's own number.
        lorainit.match_learning_rate(later, 1.0, 0.25)
        assert later.peft_config["default"].origin.measured["learning_rate"] == 0.25
        suits = known["learning_rate"] / 4
    else:
        suits = known["learning_rate"]
    lorainit.match_learning_rate(later, suits, 1e-4)
    one, other = (m.peft_config["default"].origin.measured for m in (with_start, later))
    assert other["learning_rate"] == 1e-4
    assert one.keys() == other.keys()
    for name, value in one.items():
        trials = name == "learning_rate_trials"
        expected = [pytest.approx(trial) for trial in value] if trials else pytest.approx(value)
        assert other[name] == expected, name
    lorainit.save_adapter(later, tmp_path)
    assert "learning rate:** 0.0001 (" in (tmp_path / "README.md").read_text()
    # Control: where none was measured, none is made up.
    plain = started(lorainit.PiSSA())
    lorainit.match_learning_rate(plain, 1e-3, 1e-4)
    assert "learning_rate" not in plain.peft_config["default"].origin.measured


@pytest.mark.parametrize("method", METHODS)
def test_asked_again_the_matched_rate_is_suggested(method: str, tmp_path: Path) -> None:
    """The law that leads from two steps to a run is no proportion: it is of adapters as they are started."""
    model = started(METHODS[method])
    before = suggestion(model)
    k = lorainit.match_learning_rate(model, before.value, before.value / 8)
    after = suggestion(model)
    assert after.value == pytest.approx(before.value * k, rel=1e-3)
    assert (after.low, after.high) == pytest.approx((before.low * k, before.high * k), rel=1e-3)
    assert after.start_loss == before.start_loss
    lorainit.save_adapter(model, tmp_path)
    loaded = lorainit.load_adapter(tiny.llama(), tmp_path)
    assert suggestion(loaded).value == pytest.approx(after.value, rel=1e-3)


@pytest.mark.parametrize("damaged", [{"learning_rate": None}, {"learning_rate_trials": "1e-4"}])
def test_rates_that_are_none_are_forgotten(damaged: dict[str, object]) -> None:
    """Those of a side file that was written into: the adapter is matched all the same."""
    model = started(lorainit.PiSSA(), suggest_rate=True)
    remember_measured(model, "default", damaged)
    k = lorainit.match_learning_rate(model, 1e-3, 1e-4)
    origin = model.peft_config["default"].origin
    assert origin.resized == k
    assert not any("rate" in name for name in origin.measured)
