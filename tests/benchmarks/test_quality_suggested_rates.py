"""Regret of suggested rates, on records whose regret is known."""

from __future__ import annotations

import math

import pytest
from benchmarks.quality.analysis.suggested_rates import by_model, cases, fit

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
LOSSES = (2.0, 1.5, 1.2, 1.0, 1.1, 1.5)


def run(
    label: str, rate: float, loss: float, model: str = "m", task: str = "t", start: float = 3.0
):
    return {
        "experiment": {"model": model}, "task": task, "label": label, "rank": 8,
        "learning_rate": rate, "validation": {"loss": loss}, "heldout": {"steps": [0], "loss": [start]},
    }  # fmt: skip


def said(label: str, two_steps: float, model: str = "m", task: str = "t"):
    about = {"experiment": {"model": model}, "task": task, "label": label, "rank": 8}
    return about | {"suggestion": {"two_steps": two_steps, "base_loss": 99.0}}


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
    names = ("all-minilm-l6-v2", "gemma-3-270m", "smollm2-135m-instruct")
    starts = dict(zip(names, (3.0, 2.0, 3.0), strict=True))
    ones = dict(zip(names, (4e-4, 8e-4, 4e-4), strict=True))
    records = [r for m in names for r in grid("vanilla", model=m, task=m, start=starts[m])]
    members = cases(records, [said("vanilla", ones[m], model=m, task=m) for m in names])
    heads, _, *rows = by_model(members, lambda rate: rate).splitlines()
    columns = [h.strip() for h in heads.split("|")]
    cells = {row.split(" | ")[0][2:]: [c.strip() for c in row.split("|")] for row in rows}
    suggested, other = columns.index("suggested"), columns.index("law of the other model")
    # A law that says the rate of one step: 4e-4 loses 0.2 of 2, 8e-4 is the best.
    assert [cells[m][suggested] for m in names] == ["10.0 / 10.0", "0.0 / 0.0", "10.0 / 10.0"]
    # Fitted where one step says 4e-4 and 8e-4 is best, a law is about right where it says 8e-4 only if
    # it does not follow the step; a model with a head has no say in it, and no such law.
    assert cells[names[0]][other] == "–"
    for one, from_other in ((1, 2), (2, 1)):
        c, p = fit([m for m in members if m.model == names[from_other]])
        mine = next(m for m in members if m.model == names[one])
        regret = 100 * mine.regret(c * (mine.two_steps / 5e-4) ** p)
        assert cells[names[one]][other] == f"{regret:.1f} / {regret:.1f}"
