"""Which runs the preference benchmark makes, and its table."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.common.tasks import Problem
from benchmarks.preference.data import wrong_answer
from benchmarks.preference.plan import best_rate, known, pending
from benchmarks.preference.table import by_rate, table
from benchmarks.preference.training import SUGGESTED

METHODS, RATES = ["vanilla", "eva"], ["0.1", "0.2", SUGGESTED]
LOSSES = {"0.1": 0.5, "0.2": 0.4, SUGGESTED: 0.45}


def record(method: str, rate: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"method": method, "asked_rate": rate, "seed": seed, "rate": 1e-6}
    if method == "vanilla" and rate == SUGGESTED:
        return found
    loss = LOSSES[rate] - 0.1 * (method == "eva") + 0.01 * seed
    measures = dict.fromkeys(("test_margins", "test_accuracies"), 1 - loss)
    return found | measures | {"validation_loss": loss, "test_loss": loss}


def made(seeds: int) -> list[dict[str, Any]]:
    """The records of a benchmark that was run to its end, one plan after the other."""
    records: list[dict[str, Any]] = []
    while runs := pending(records, METHODS, RATES, seeds, 2):
        records += [record(*run) for run in runs]
    return records


def test_the_best_rate_alone_is_run_on_every_seed() -> None:
    records = made(5)
    assert len(records) == len(known(records)) == 2 * (2 + 5 + 5)
    assert {r["seed"] for r in records if r["asked_rate"] == "0.1"} == {0, 1}
    assert {r["seed"] for r in records if r["asked_rate"] == "0.2"} == set(range(5))


def test_an_unfinished_grid_has_no_best_rate_yet() -> None:
    records = [record("eva", "0.1", 0), record("vanilla", "0.1", 0)]
    seeds = {seed for _, rate, seed in pending(records, METHODS, RATES, 5, 2) if rate != SUGGESTED}
    assert seeds == {0, 1}


def test_the_best_rate_is_judged_on_common_seeds() -> None:
    """Seeds 2 to 4 are worse, and only the best rate has them."""
    records = made(5)
    for r in records:
        if r["seed"] > 1 and "validation_loss" in r:
            r["validation_loss"] += 1
    assert best_rate(records, "eva") == "0.2"
    assert best_rate(records, "gora") is None


def test_the_table_compares_seed_by_seed() -> None:
    lines = table(made(5)).splitlines()
    assert len(lines) == 2 + 3
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[1:4] == ["eva", "1e-06 (best, edge of the grid)", "5"]
    assert cells[9] == "-0.1000 [-0.1000, -0.1000]"
    assert cells[6].startswith("0.3200 [0.3")


def test_rates_are_compared_on_common_seeds() -> None:
    lines = by_rate(made(5)).splitlines()
    assert lines[2:] == ["| vanilla | 2 | 0.5050 | 0.4050 |", "| eva | 2 | 0.4050 | 0.3050 |"]


def test_a_wrong_answer_is_another_problems() -> None:
    problems = [Problem("1+1", "2"), Problem("2+0", "2"), Problem("5+5", "10"), Problem("3", "3")]
    assert wrong_answer(problems, 0) == "3"
    with pytest.raises(ValueError, match="no other answer"):
        wrong_answer(problems[:2], 0)
