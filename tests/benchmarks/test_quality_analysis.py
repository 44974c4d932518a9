"""The analysis against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.quality.analysis.aims import aims_table
from benchmarks.quality.analysis.claims import claims_table, verdict
from benchmarks.quality.analysis.curves import area, crossing, good_range
from benchmarks.quality.analysis.figures import differences, figures
from benchmarks.quality.analysis.forgetting import forgetting_table
from benchmarks.quality.analysis.intervals import bootstrap, sign_flip, stratified
from benchmarks.quality.analysis.lines import collect_lines
from benchmarks.quality.analysis.report import report
from benchmarks.quality.experiment import CURVE_PERCENT, Experiment
from benchmarks.quality.records import head


def test_the_crossing_lies_on_the_line_between_points():
    assert crossing([0, 10, 20], [3.0, 2.0, 1.0], 1.5) == pytest.approx(15)
    assert crossing([0, 10, 20], [3.0, 2.0, 1.0], 3.0) == 0
    assert crossing([0, 10, 20], [3.0, 2.0, 2.5], 1.5) == math.inf
    assert crossing([0, 10, 20], [3.0, math.nan, 1.0], 1.5) >= 10


def test_the_area_is_the_mean_of_the_curve():
    assert area([0, 10], [2.0, 4.0]) == pytest.approx(3.0)
    assert area([0, 10], [2.0, 4.0], until=5) == pytest.approx(2.5)


def test_the_bootstrap_covers_its_mean():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        low, high = bootstrap(generator.normal(size=40), seed)
        hits += low <= 0 <= high
    assert hits >= 50


def test_the_sign_flip_test_is_exact():
    assert sign_flip([1.0, 2.0, 3.0, 1.0, 2.0]) == pytest.approx(2 / 32)
    assert sign_flip([1.0, -1.0]) == 1.0
    assert sign_flip([0.0, 0.0]) == 1.0


def test_the_good_range_ends_where_scores_fall():
    rates = [1e-4, 1e-3, 1e-2]
    assert good_range(rates, [1.0, 1.0, 1.0]) == pytest.approx(2.0)
    assert good_range(rates, [0.0, 1.0, 1.0]) == pytest.approx(1.02, abs=0.01)
    assert good_range(rates, [0.0, 0.0, 0.0]) == 0.0


def record(method: str, seed: int, rate: float, exact: float, losses: list[float], stage="seeds"):
    experiment = Experiment("chain_sum", method, rate, seed, steps=10)
    steps = list(np.linspace(0, 10, len(losses)))
    return head(experiment, stage) | {
        "validation": {"loss": losses[-1], "exact": exact, "sequences": 10},
        "test": {"loss": losses[-1], "exact": exact, "sequences": 10},
        "heldout": {"steps": steps, "loss": losses},
        "heldout_at_percent": {str(p): losses[0] for p in CURVE_PERCENT},
        "init_seconds": 1.0,
        "train_seconds": 10.0,
        "diverged": False,
    }


def test_the_rate_is_validations_and_the_target_plain_loras(tmp_path):
    records = []
    for seed in range(3):
        records += [
            record("vanilla", seed, 1e-3, 0.5 + 0.01 * seed, [3.0, 2.0, 1.0]),
            record("vanilla", seed, 1e-2, 0.1, [3.0, 3.0, 3.0]),
            record("natural", seed, 1e-3, 0.6 + 0.01 * seed, [2.0, 1.0, 0.5]),
        ]
    lines = collect_lines(records)
    assert lines["chain_sum", "vanilla"].rate == 1e-3
    natural = lines["chain_sum", "natural"]
    assert natural.steps_to == pytest.approx([5.0] * 3)
    assert natural.seconds_to == pytest.approx([6.0] * 3)
    assert natural.early[0] == pytest.approx(1.9 - 1.0)
    search = [record("vanilla", 0, rate, 0.5, [1.0, 1.0], "search") for rate in (1e-4, 1e-3)]
    text = report(records + search)
    assert "+10.00" in text
    assert "| natural | 61.0" in text
    paths = figures(lines, search, tmp_path, "model")
    assert all(path.exists() for path in paths)
    assert len(paths) == 2


def test_the_picture_has_lines_with_an_interval_and_all_tasks(tmp_path, monkeypatch):
    """Three seeds give no interval, and a method that lacks a task is not beside those that have it."""
    from benchmarks.quality.analysis import figures as module

    seen = {}
    monkeypatch.setattr(module.pyplot, "close", lambda figure: seen.update(axes=figure.axes))
    records = [
        record(method, seed, 1e-3, 0.5 + gain * 0.1 + 0.01 * seed, [3.0, 1.0])
        for method, gain, seeds in (
            ("vanilla", 0, 5),
            ("natural", 1, 5),
            ("eva", -1, 5),
            ("filet", 2, 3),
        )
        for seed in range(seeds)
    ]
    lines = collect_lines(records)
    assert differences({"model": lines}, tmp_path / "a.png").exists()
    (axis,) = seen["axes"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["eva", "natural"]
    lines["simple_equations", "vanilla"] = lines["chain_sum", "vanilla"]
    differences({"model": lines}, tmp_path / "b.png")
    assert not any(axis.lines for axis in seen["axes"])


def test_an_interval_within_tasks_does_not_see_the_distance_between_them():
    apart = [[0.0, 0.1, 0.1, 0.2], [10.0, 10.1, 10.1, 10.2]]
    low, high = stratified(apart)
    assert 5.0 <= low < 5.1 < high <= 5.2
    low, high = bootstrap([x for group in apart for x in group])
    assert high - low > 3
    # Three seeds are too few for either.
    assert math.isnan(stratified([[1.0, 1.1, 1.2], [1.0, 1.1, 1.2, 1.3]])[0])
    assert math.isnan(bootstrap([1.0, 1.1, 1.2])[0])


def test_a_claim_holds_only_where_the_interval_says_so():
    assert verdict(0.1, 0.2) == "held"
    assert verdict(-0.2, -0.1) == "did not hold"
    assert verdict(-0.1, 0.1) == "open"
    assert verdict(math.nan, math.nan).startswith("open")
    records = []
    for seed in range(5):
        noise = 0.01 * seed
        records += [
            record("vanilla", seed, 1e-3, 0.5 + noise, [3.0, 2.0, 1.0 + noise]),
            record("natural", seed, 1e-3, 0.6 + noise, [2.0, 1.0, 0.5]),
            record("pissa", seed, 1e-3, 0.2 + 0.05 * seed, [3.0, 2.5, 1.0 + noise]),
        ]
    swept = [r | {"rank": rank} for r in records for rank in (1, 8)]
    rows = {r.split(" | ")[0]: r for r in claims_table(collect_lines(records), swept).split("\n| ")}
    natural, pissa = (rows[k].removesuffix(" |").split(" | ") for k in ("natural", "pissa"))
    assert natural[1] == "held: +10.00 [+10.00, +10.00] points"
    assert natural[2].startswith("held")
    assert natural[3].startswith("open: 1.00")
    assert natural[4:] == ["1: +10.0, 8: +10.0", "10%"]
    assert pissa[1].startswith("did not hold")
    assert pissa[2].startswith("did not hold")
    assert pissa[3].startswith("did not hold")


def test_forgetting_counts_from_the_base():
    records = []
    for method, start, end in (("vanilla", 2.0, 3.0), ("natural", 2.5, 2.75)):
        other = {"loss": end, "start_loss": start, "exact": 0.0, "sequences": 5}
        records.append(record(method, 0, 1e-3, 0.5, [3.0, 1.0]) | {"other": other})
    text = forgetting_table(collect_lines(records), records)
    assert "| vanilla | +1.00 |" in text
    assert "| natural | +0.75 |" in text


def test_the_aims_are_against_the_best_of_the_others():
    records, search = [], []
    for seed in range(5):
        records += [
            record("vanilla", seed, 1e-3, 0.5, [3.0, 2.0, 1.0]),
            record("pissa", seed, 1e-3, 0.55, [3.0, 1.0, 0.5]),
            record("natural", seed, 1e-3, 0.6, [2.0, 0.5, 0.4]),
        ]
    for rate in (1e-4, 1e-3, 1e-2):
        search.append(record("vanilla", 0, rate, 0.5, [1.0, 1.0], "search"))
        search.append(record("natural", 0, rate, 0.5 * (rate < 2e-3), [1.0, 1.0], "search"))
    few = [r | {"test": r["test"] | {"exact": 0.1}} for r in records if r["label"] != "natural"]
    text = aims_table(collect_lines(records), search, [*few, records[2]])
    natural = next(line for line in text.splitlines() if line.startswith("| natural"))
    cells = natural.strip("| ").split(" | ")
    # Crossings of 1.0: natural at 3.33 of 10 steps, pissa at 5; early means 1.85 and 2.8, less 1.0.
    assert cells[1] == "67%"
    assert cells[2] == "47%"
    assert cells[3] == "1 above, 0 significantly below, of 1"
    assert cells[4] == "1.02 / 2.00"
    assert cells[5] == "1 of 1"
    pissa = next(line for line in text.splitlines() if line.startswith("| pissa"))
    assert "150% | 212%" in pissa
    assert "0 above, 1 significantly below, of 1" in pissa
