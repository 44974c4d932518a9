"""The comparison of lines at every rate, against a second implementation written apart from it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.quality.analysis.rate_figure import rate_figure
from benchmarks.quality.analysis.rate_grid import (
    best_rate,
    by_rate,
    cells_of,
    comparison,
    differences,
    holm,
    interval,
    loss_of,
    rate_table,
    task_level_p,
    tuned_loss,
)
from benchmarks.quality.arguments import experiments_of

TASKS, LABELS, RATES, SEEDS = (
    ("a", "b", "c", "d"),
    ("vanilla", "auto", "pissa"),
    (1e-4, 1e-3, 1e-2),
    (0, 1, 2),
)


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = []
    for task in TASKS:
        level = rng.uniform(0.5, 1.5)
        for label in LABELS:
            gain = {"vanilla": 0.0, "auto": 0.05, "pissa": -0.02}[label]
            for rate in RATES:
                for seed in SEEDS:
                    loss = level + 0.2 * math.log10(rate / 1e-3) ** 2 - gain + 0.01 * rng.normal()
                    found.append(
                        {
                            "stage": "grid", "task": task, "label": label, "learning_rate": rate, "seed": seed,
                            "validation": {"loss": loss + 0.002 * rng.normal()},
                            "test": {"loss": loss, "exact": float(1 / (1 + loss))},
                        }
                    )  # fmt: skip
    return found


def second_implementation(records: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Mean difference of test losses, half width of its t interval, and mean log ratio, by label; in numpy."""
    shape = (len(TASKS), len(LABELS), len(RATES), len(SEEDS))
    test, validation = np.empty(shape), np.empty(shape)
    for r in records:
        place = (
            TASKS.index(r["task"]), LABELS.index(r["label"]),
            RATES.index(r["learning_rate"]), SEEDS.index(r["seed"]),
        )  # fmt: skip
        test[place], validation[place] = r["test"]["loss"], r["validation"]["loss"]
    best = validation.mean(-1).argmin(-1)
    at_best = np.take_along_axis(test, best[..., None, None], axis=2)[:, :, 0]
    found = {}
    for i, label in enumerate(LABELS[1:], 1):
        gaps = at_best[:, i].mean(-1) - at_best[:, 0].mean(-1)
        ratios = np.log(at_best[:, i] / at_best[:, 0]).mean()
        # Student's t at 97.5% with three degrees of freedom.
        half = 3.182446305284263 * gaps.std(ddof=1) / np.sqrt(len(gaps))
        found[label] = (float(gaps.mean()), float(half), float(ratios))
    return found


def test_two_implementations_agree(records: list[dict[str, Any]]) -> None:
    expected = second_implementation(records)
    found = differences(cells_of(records))
    assert set(found) == set(expected)
    for label, (gap, half, ratio) in expected.items():
        losses = [d.loss for d in found[label]]
        assert np.mean(losses) == pytest.approx(gap, abs=1e-12)
        low, high = interval(losses)
        assert (high - low) / 2 == pytest.approx(half, abs=1e-12)
        assert np.mean([d.log_ratio for d in found[label]]) == pytest.approx(ratio, abs=1e-12)
    # The negative control: the first rate for all is another comparison.
    fixed = [r for r in records if r["learning_rate"] == RATES[0]]
    assert np.mean([d.loss for d in differences(cells_of(fixed))["auto"]]) != pytest.approx(
        expected["auto"][0], abs=1e-4
    )


def test_rates_are_chosen_on_validation(records: list[dict[str, Any]]) -> None:
    cells = cells_of(records)
    assert {best_rate(rates) for lines in cells.values() for rates in lines.values()} == {1e-3}
    # Test scores have no say.
    spoiled = [{**r, "test": {"loss": -r["learning_rate"], "exact": 0.0}} for r in records]
    assert best_rate(cells_of(spoiled)["a"]["auto"]) == 1e-3
    # A seed that lacks a rate is left out at all rates, so the choice is among equals.
    fewer = [r for r in records if not (r["learning_rate"] == 1e-3 and r["seed"] == 2)]
    kept = cells_of(fewer)["a"]["auto"]
    assert best_rate(kept) == 1e-3
    assert {tuple(sorted(members)) for members in kept.values()} == {(0, 1)}
    # Unless that rate is left out for all.
    others = [rate for rate in RATES if rate != 1e-3]
    kept = cells_of(fewer, rates=others)["a"]["auto"]
    assert sorted(kept) == sorted(others)
    assert {tuple(sorted(members)) for members in kept.values()} == {(0, 1, 2)}
    without = [r for r in records if r["learning_rate"] != 1e-3 or r["label"] != "pissa"]
    assert "pissa" not in cells_of(without)["a"]


def test_a_tuned_loss_is_that_of_the_best_rate(records: list[dict[str, Any]]) -> None:
    line = cells_of(records)["a"]["auto"]
    at_best = [r["test"]["loss"] for r in line[best_rate(line)].values()]
    assert tuned_loss(line) == pytest.approx(np.mean(at_best), abs=1e-12)
    assert tuned_loss(line) != pytest.approx(np.mean([loss_of(r) for r in line[RATES[0]].values()]))


def test_a_grid_at_some_rates() -> None:
    arguments = argparse.Namespace(
        stage="grid", methods=["vanilla"], tasks=["gcd"], seeds=[1], at=[1e-4, 1e-3], set=[]
    )
    found = experiments_of(arguments, [])
    assert [(e.learning_rate, e.seed) for e in found] == [(1e-4, 1), (1e-3, 1)]


def test_a_run_that_diverged_is_infinitely_bad(records: list[dict[str, Any]]) -> None:
    lost = [
        {**r, "test": {"loss": None, "exact": 0.0}, "validation": {"loss": None}}
        if r["learning_rate"] == 1e-2 and r["label"] == "pissa"
        else r
        for r in records
    ]
    cells = cells_of(lost)
    assert best_rate(cells["a"]["pissa"]) == 1e-3
    assert math.isinf(by_rate(cells)[1]["pissa"][-1])
    assert "diverged" in rate_table(cells)


def test_holm() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_a_difference_is_found_and_noise_is_not(records: list[dict[str, Any]]) -> None:
    found = differences(cells_of(records))
    assert task_level_p([d.loss for d in found["auto"]]) < 0.01
    same = [{**r, "label": "vanilla"} for r in records if r["label"] == "vanilla"]
    twin = [{**r, "label": "twin"} for r in same]
    twins = differences(cells_of([*same, *twin]))["twin"]
    assert all(d.loss == 0 and d.exact == 0 for d in twins)
    text = comparison(cells_of(records))
    assert text.index("auto") < text.index("pissa")


def test_the_figure_is_drawn(records: list[dict[str, Any]], tmp_path: Path) -> None:
    path = rate_figure(cells_of(records), tmp_path / "rates.png")
    assert path.stat().st_size > 10_000
