"""The comparison of lines at every rate, against a second implementation written apart from it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
from benchmarks.quality.analysis.grid_comparison import by_task, comparison, differences
from benchmarks.quality.analysis.rate_figure import rate_figure
from benchmarks.quality.analysis.rate_grid import (
    best_rate,
    cells_of,
    loss_of,
    pairs,
    shared,
    tuned_loss,
)
from benchmarks.quality.analysis.rate_tables import (
    by_rate,
    claims_at_rates,
    common_tasks,
    gaps_at,
    rate_table,
)
from benchmarks.quality.analysis.t_tests import holm, interval, task_level_p
from benchmarks.quality.arguments import experiments_of
from benchmarks.quality.experiment import GRID

from tests.benchmarks import second_grid as second
from tests.benchmarks.made_up_grid import LABELS, SIX, TASKS, Record, made


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return made()


@pytest.mark.parametrize("least", [SIX, GRID], ids=["six rates", "nine rates"])
def test_two_implementations_agree(records: list[Record], least: tuple[float, ...]) -> None:
    found = differences(cells_of(records, least=least))
    assert set(found) == set(LABELS[1:])
    for label, mine in found.items():
        expected = second.gaps(records, label, "test", "loss", least=least)
        assert [d.loss for d in mine] == pytest.approx([a.mean() - b.mean() for a, b in expected])
        gap, half = second.mean_and_half(np.array([a.mean() - b.mean() for a, b in expected]))
        low, high = interval([d.loss for d in mine])
        assert (low + high) / 2 == pytest.approx(gap, abs=1e-12)
        assert (high - low) / 2 == pytest.approx(half, abs=1e-12)
        ratio = np.mean([np.log(a / b).mean() for a, b in expected])
        assert np.mean([d.log_ratio for d in mine]) == pytest.approx(ratio, abs=1e-12)
        for d, (seeds, rate, base, rates) in zip(
            mine, second.choices(records, label, least), strict=True
        ):
            assert d.pair.seeds == list(seeds)
            assert (d.pair.rate, d.pair.base_rate) == (GRID[rate], GRID[base])
            assert d.pair.rates == [GRID[r] for r in rates]
    # The negative control: all seeds that either line has are another comparison.
    test = second.cube(records, "test", "loss")
    values = test[:, 1, GRID.index(1e-3)], test[:, 0, GRID.index(1e-3)]
    unpaired = np.mean([np.nanmean(a) - np.nanmean(b) for a, b in zip(*values, strict=True)])
    assert np.mean([d.loss for d in found["auto"]]) != pytest.approx(unpaired, abs=1e-5)


def test_on_one_task_two_implementations_agree(records: list[Record]) -> None:
    """Welch's interval of the loss; that of the exact match with the items' variance in it."""
    bits = {
        r["id"]: [int(b) for byte in bytes.fromhex(r["test"]["items"]) for b in f"{byte:08b}"][:24]
        for r in records
    }
    for d in differences(cells_of(records))["auto"]:
        p = d.pair
        assert d.seeds == 4
        a, b = (np.array([r["test"]["loss"] for r in runs]) for runs in (p.mine, p.base))
        assert (d.high - d.low) / 2 == pytest.approx(second.welch_half(a, b))
        a, b = (np.array([100 * np.mean(bits[r["id"]]) for r in runs]) for runs in (p.mine, p.base))
        mine, base = (np.mean([bits[r["id"]] for r in runs], 0) for runs in (p.mine, p.base))
        variance = (100 * (mine - base)).var(ddof=1) / 24
        assert d.exact == pytest.approx(a.mean() - b.mean())
        half = second.welch_half(a, b, variance, 24)
        assert (d.exact_high - d.exact_low) / 2 == pytest.approx(half)
        # Items add to what seeds say.
        assert half > second.welch_half(a, b)
        bound = [np.mean([r["test"]["loss_error"] ** 2 for r in runs]) for runs in (p.mine, p.base)]
        assert d.item_bound == pytest.approx(math.sqrt(sum(bound)))
    assert by_task(cells_of(records)).count("\n") == 1 + 2 * len(TASKS)
    # One seed has no interval, and no row.
    assert by_task(cells_of([r for r in records if r["seed"] == 0])) == ""


def test_two_lines_get_the_same_seeds_and_rates(records: list[Record]) -> None:
    cells = cells_of(records)
    # Auto's last seed was cut short after three rates: it has no say, not even at these.
    assert all(4 not in members for members in cells["gcd"]["auto"].values())
    (auto, *_), (pissa, *_) = pairs(cells, "auto"), pairs(cells, "pissa")
    assert (auto.seeds, auto.rates) == ([0, 1, 2, 3], list(SIX))
    # PiSSA's second seed has nine rates, plain LoRA's has six: both get six.
    assert (pissa.seeds, pissa.rates) == ([0, 1], list(SIX))
    first = pairs(cells_of(records, least=GRID), "pissa")
    assert [(p.seeds, p.rates) for p in first] == [([0], list(GRID))] * len(TASKS)
    # Its best rate is below the six: the comparison at six says that it ends at their edge.
    assert {p.rate for p in first} == {5e-5}
    assert not any(p.at_edge for p in first)
    assert {p.rate for p in pairs(cells, "pissa")} == {1e-4}
    assert all(p.at_edge for p in pairs(cells, "pissa"))
    # Lines that share no seed are not compared.
    apart = [r for r in records if (r["label"] == "auto") == (r["seed"] == 0)]
    assert pairs(cells_of(apart), "auto") == []
    assert "auto" not in comparison(cells_of(apart))


def test_rates_are_chosen_on_validation(records: list[Record]) -> None:
    cells = cells_of(records)
    assert {best_rate(lines["auto"]) for lines in cells.values()} == {1e-3}
    # Test scores have no say.
    spoiled = [{**r, "test": r["test"] | {"loss": -r["learning_rate"]}} for r in records]
    assert best_rate(cells_of(spoiled)["gcd"]["auto"]) == 1e-3
    # A seed that lacks a rate is left out at all rates, so the choice is among equals.
    fewer = [r for r in records if not (r["learning_rate"] == 1e-3 and r["seed"] == 2)]
    kept = shared(cells_of(fewer)["gcd"]["auto"])[0]
    assert {tuple(members) for members in kept.values()} == {(0, 1, 3)}
    # Unless that rate is left out for all.
    others = [rate for rate in SIX if rate != 1e-3]
    kept = cells_of(fewer, rates=others)["gcd"]["auto"]
    assert sorted(kept) == others
    assert {tuple(members) for members in kept.values()} == {(0, 1, 2, 3)}
    without = [r for r in records if r["learning_rate"] != 1e-3 or r["label"] != "pissa"]
    assert "pissa" not in cells_of(without)["gcd"]


def test_plain_lora_is_tuned_on_the_shared_seeds_alone() -> None:
    """By hand: plain LoRA is best at 1e-4 on its first seed, at 1e-3 over both; the line has the first."""

    def run(label: str, rate: float, seed: int, loss: float) -> Record:
        split = {"loss": loss, "exact": 0.5}
        about = {"stage": "grid", "task": "a", "label": label, "learning_rate": rate, "seed": seed}
        return about | {"validation": split, "test": split}

    runs = [
        run("vanilla", 1e-4, 0, 1.0), run("vanilla", 1e-3, 0, 1.25),
        run("vanilla", 1e-4, 1, 3.0), run("vanilla", 1e-3, 1, 1.0),
        run("auto", 1e-4, 0, 1.5), run("auto", 1e-3, 0, 0.5),
    ]  # fmt: skip
    cells = cells_of(runs, least=(1e-4, 1e-3))
    (found,) = pairs(cells, "auto")
    assert (found.seeds, found.rate, found.base_rate) == ([0], 1e-3, 1e-4)
    assert differences(cells)["auto"][0].loss == 0.5 - 1.0
    assert best_rate(cells["a"]["vanilla"]) == 1e-3


def test_a_tuned_loss_is_that_of_the_best_rate(records: list[Record]) -> None:
    line = cells_of(records)["gcd"]["auto"]
    at_best = [r["test"]["loss"] for r in line[best_rate(line)].values()]
    assert tuned_loss(line) == pytest.approx(np.mean(at_best), abs=1e-12)
    assert tuned_loss(line) != pytest.approx(np.mean([loss_of(r) for r in line[GRID[0]].values()]))


def test_means_at_fixed_rates_are_over_the_seeds_that_both_have(records: list[Record]) -> None:
    cells = cells_of(records)
    test = second.cube(records, "test", "loss")
    auto = np.where(np.arange(5) == 4, np.nan, test[:, 1])  # without the seed that was cut short
    for rate in GRID:
        place = GRID.index(rate)
        expected = np.nanmean(auto[:, place] - test[:, 0, place], -1)
        assert gaps_at(cells, "auto", rate) == pytest.approx(expected)
    rates, found = by_rate(cells)
    assert rates == list(GRID)
    # Above plain LoRA's own best rate, over plain LoRA's seeds at the six rates.
    validation = second.cube(records, "validation", "loss")[:, 0, 2:8]
    best = [2 + int(mean.argmin()) for mean in validation.mean(-1)]
    for place, _ in enumerate(GRID):
        above = [np.nanmean(auto[t, place] - test[t, 0, best[t]]) for t in range(len(TASKS))]
        assert found["auto"][place] == pytest.approx(np.mean(above))
    text = claims_at_rates(cells)
    row = next(x for x in text.splitlines() if x.startswith("| auto"))
    assert f"{np.mean(gaps_at(cells, 'auto', 1e-4)):+.3f} [" in row
    assert f"{np.mean([d.loss for d in differences(cells)['auto']]):+.3f} [" in row
    # PiSSA's best rate is low: ahead at 1e-4 and behind with both tuned, as a fixed rate would hide.
    assert np.mean(gaps_at(cells, "pissa", 1e-4)) < 0 < np.mean(
        [d.loss for d in differences(cells_of(records, least=GRID))["pissa"]]
    )  # fmt: skip


def test_means_over_tasks_are_of_the_same_tasks(records: list[Record]) -> None:
    assert set(common_tasks(cells_of(records))) == set(TASKS)
    fewer = [r for r in records if r["label"] != "pissa" or r["task"] in TASKS[:2]]
    assert set(common_tasks(cells_of(fewer))) == set(TASKS[:2])
    # A line on one task of four would leave one task: it is left out instead.
    rare = [r for r in records if r["label"] != "pissa" or r["task"] == TASKS[0]]
    common = common_tasks(cells_of(rare))
    assert set(common) == set(TASKS)
    assert all(set(lines) == {"vanilla", "auto"} for lines in common.values())
    # A rate at which one of the tasks has not run has no mean.
    gone = [r for r in records if (r["task"], r["learning_rate"]) != ("gcd", 2e-5)]
    assert math.isnan(by_rate(cells_of(gone))[1]["auto"][0])
    assert "–" in rate_table(cells_of(gone))


def test_a_grid_at_some_rates() -> None:
    arguments = argparse.Namespace(
        stage="grid", methods=["vanilla"], tasks=["gcd"], seeds=[1], at=[1e-4, 1e-3], set=[]
    )
    found = experiments_of(arguments, [])
    assert [(e.learning_rate, e.seed) for e in found] == [(1e-4, 1), (1e-3, 1)]


def test_a_run_that_diverged_is_infinitely_bad(records: list[Record]) -> None:
    lost = [
        {**r, "test": r["test"] | {"loss": None}, "validation": {"loss": None}}
        if r["learning_rate"] == 1e-2 and r["label"] == "pissa"
        else r
        for r in records
    ]
    cells = cells_of(lost)
    assert best_rate(cells["gcd"]["pissa"]) == 5e-5
    assert math.isinf(by_rate(cells)[1]["pissa"][-1])
    assert "diverged" in rate_table(cells)


def test_holm() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_a_difference_is_found_and_noise_is_not(records: list[Record]) -> None:
    found = differences(cells_of(records))
    assert task_level_p([d.loss for d in found["auto"]]) < 0.01
    same = [r for r in records if r["label"] == "vanilla"]
    twin = [{**r, "label": "twin"} for r in same]
    twins = differences(cells_of([*same, *twin]))["twin"]
    assert all(d.loss == 0 and d.exact == 0 and d.seeds == 5 for d in twins)
    text = comparison(cells_of(records))
    assert text.index("auto") < text.index("pissa")


def test_the_figure_is_drawn(records: list[Record], tmp_path: Path) -> None:
    path = rate_figure(cells_of(records), tmp_path / "rates.png")
    assert path.stat().st_size > 10_000
