"""Regret of suggested rates, on records whose regret is known."""

from __future__ import annotations

import math

import pytest
from benchmarks.quality.analysis.steps_of_runs import after, minimum, steps_of_runs
from benchmarks.quality.analysis.suggested_rates import by_model, cases, fit, interval

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


def test_the_interval_is_over_tasks():
    """Lines of one task go together: three good tasks and one bad one."""
    losses = {task: 1.0 for task in "abc"} | {"d": 1.5}
    records, said_of = [], []
    for task, at_best in losses.items():
        for label in ("vanilla", "auto"):
            records += [
                run(label, rate, loss, task=task) for rate, loss in zip(RATES, LOSSES, strict=True)
            ]
            said_of.append(said(label, 8e-4 if at_best == 1.0 else 2e-4, task=task))
    text = interval(cases(records, said_of), lambda rate: rate)
    # The bad task's 25% are in no draw or in many, so the ninth decile is anything from none to them.
    assert text == "[0.0, 25.0] / [0.0, 25.0]"
    same = [said(label, 8e-4, task=task) for task in losses for label in ("vanilla", "auto")]
    assert interval(cases(records, same), lambda rate: rate) == "[0.0, 0.0] / [0.0, 0.0]"


def test_the_rate_that_first_steps_tell():
    rates = [1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3]
    parabola = {r: [1 + math.log(r / 6e-4) ** 2] for r in rates}
    assert minimum(parabola) == pytest.approx(6e-4, rel=1e-6)
    assert minimum({r: [r] for r in rates}) == 1e-4
    assert minimum(parabola | {1e-3: [math.inf]}) == 4.5e-4


def test_what_the_runs_own_steps_would_have_lost():
    """After two steps the rate below the best one is lowest, after three the best."""
    records = []
    for rate, loss in zip(RATES, LOSSES, strict=True):
        two = abs(math.log(rate / 4e-4))
        three = None if rate > 3e-3 else abs(math.log(rate / 8e-4))
        record = run("vanilla", rate, loss)
        record["heldout"] = {"steps": [0, 2, 3, 6, 13], "loss": [3.0, two, three, three, three]}
        records.append(record)
    (found,) = cases(records, after(records, 2))
    assert found.two_steps == pytest.approx(4e-4)
    head, _, row = steps_of_runs(records, lambda rate: rate).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["m", "1", "10.0 / 10.0", *["0.0 / 0.0"] * 3]
    assert "after 13 steps" in head
    # A quantized base is no model of its own here.
    quantized = [r | {"experiment": {"model": "m+nf4"}} for r in records]
    assert steps_of_runs([*records, *quantized], lambda rate: rate).splitlines()[2] == row
