"""The analysis against numbers that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.quality.analyze import (
    area,
    bootstrap,
    collect_lines,
    crossing,
    figures,
    good_range,
    report,
    sign_flip,
)
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
    paths = figures(lines, search, tmp_path)
    assert all(path.exists() for path in paths)
    assert len(paths) == 2
