"""Regret of suggested rates, on records whose regret is known."""

from __future__ import annotations

import math

import pytest
from benchmarks.quality.analysis.suggested_rates import by_model, cases

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
LOSSES = (2.0, 1.5, 1.2, 1.0, 1.1, 1.5)


def run(
    label: str, rate: float, loss: float, model: str = "m", task: str = "t", start: float = 3.0
):
    return {
        "experiment": {"model": model}, "task": task, "label": label, "rank": 8,
        "learning_rate": rate, "validation": {"loss": loss}, "heldout": {"steps": [0], "loss": [start]},
    }  # fmt: skip


def said(label: str, one_step: float, model: str = "m", task: str = "t"):
    about = {"experiment": {"model": model}, "task": task, "label": label, "rank": 8}
    return about | {"suggestion": {"one_step": one_step, "base_loss": 99.0}}


def grid(label: str, **named):
    return [run(label, rate, loss, **named) for rate, loss in zip(RATES, LOSSES, strict=True)]


def test_regret_is_a_share_of_what_plain_lora_begins_with():
    """The base is plain LoRA's loss before its first step, whatever the start or the suggestion say."""
    records = [*grid("vanilla"), *grid("auto", start=1.3)]
    found = {
        case.key[1]: case for case in cases(records, [said("vanilla", 5e-4), said("auto", 5e-4)])
    }
    for label in ("vanilla", "auto"):
        assert found[label].base == 3.0
        assert found[label].regret(8e-4) == 0
        assert found[label].regret(2e-4) == pytest.approx((1.5 - 1.0) / (3.0 - 1.0))
        # Between two rates on a straight line in the logarithm, beyond the last one at it.
        middle = math.sqrt(8e-4 * 1.6e-3)
        assert found[label].regret(middle) == pytest.approx(0.05 / 2.0)
        assert found[label].regret(1.0) == pytest.approx(0.5 / 2.0)


def test_what_has_no_whole_grid_or_no_suggestion_is_left_out():
    refused = {**said("auto", 1.0), "refused": "why"}
    del refused["suggestion"]
    records = [*grid("vanilla"), *grid("auto"), *grid("pissa")[:5]]
    found = cases(records, [said("vanilla", 5e-4), refused, said("pissa", 5e-4)])
    assert [case.key[1] for case in found] == ["vanilla"]


def test_each_model_has_a_row_of_its_own():
    records = [*grid("vanilla"), *grid("vanilla", model="other", task="u", start=2.0)]
    members = cases(
        records, [said("vanilla", 4e-4), said("vanilla", 8e-4, model="other", task="u")]
    )
    heads, _, one, other = by_model(members, lambda rate: rate).splitlines()
    assert "suggested" in heads
    # A law that says the rate of one step: 4e-4 loses 0.2 of 2, 8e-4 is the best.
    assert one.split(" | ")[:3] == ["| m", "1", "10.0 / 10.0"]
    assert other.split(" | ")[:3] == ["| other", "1", "0.0 / 0.0"]
