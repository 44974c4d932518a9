"""Forgetting, ranks, cost and the whole page of a model, from made-up records worked out a second time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks.quality import analyze
from benchmarks.quality.analysis.cost import StepTimes, cost_of, cost_table
from benchmarks.quality.analysis.grid_forgetting import grid_forgetting_table, rises_of
from benchmarks.quality.analysis.grid_report import by_grid_model, grid_report
from benchmarks.quality.analysis.rank_tables import cells_by_rank, rank_tables
from benchmarks.quality.analysis.rate_grid import cells_of, pairs
from benchmarks.quality.choose import CHOSEN, rooms
from benchmarks.quality.compare_grid import write_grids
from benchmarks.quality.experiment import GRID
from benchmarks.quality.records import RESULTS, read_records

from tests.benchmarks import second_grid as second
from tests.benchmarks.made_up_grid import SIX, STEPS, TASKS, Record, made


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return made()


def row_of(text: str, label: str) -> list[str]:
    line = next(x for x in text.splitlines() if x.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_forgetting_is_read_at_the_best_rates_of_the_final_score(records: list[Record]) -> None:
    cells = cells_of(records)
    after = second.gaps(records, "auto", "other", "loss")
    start = [base for _, base in second.gaps(records, "auto", "other", "start_loss")]
    for found, (mine, base), before in zip(pairs(cells, "auto"), after, start, strict=True):
        rises = np.array(list(rises_of(found)))
        assert rises[:, 0] == pytest.approx(mine - before)
        assert rises[:, 1] == pytest.approx(base - before)
    row = row_of(grid_forgetting_table(cells), "auto")
    mean, half = second.mean_and_half(np.array([(a - b).mean() for a, b in after]))
    assert row[5] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    assert mean > 0
    assert (
        row[3]
        == f"{np.mean([(a - s).mean() for (a, _), s in zip(after, start, strict=True)]):+.3f}"
    )
    test, _ = second.mean_and_half(
        np.array([(a - b).mean() for a, b in second.gaps(records, "auto", "test", "loss")])
    )
    assert row[2].startswith(f"{test:+.3f} [")
    # Runs without it are left out, one by one; with none there is no table.
    some = [{k: v for k, v in r.items() if k != "other" or r["seed"] != 1} for r in records]
    assert all(len(list(rises_of(p))) == 3 for p in pairs(cells_of(some), "auto"))
    none = [{k: v for k, v in r.items() if k != "other"} for r in records]
    assert grid_forgetting_table(cells_of(none)) == ""


def test_ranks_are_compared_each_with_its_own_plain_lora(records: list[Record]) -> None:
    one = [r for r in made(rank=1) if r["task"] in TASKS[:2] and r["learning_rate"] in SIX]
    both = [*records, *one]
    assert {rank: set(cells) for rank, cells in cells_by_rank(both).items()} == {
        1: set(TASKS[:2]), 8: set(TASKS[:2]),
    }  # fmt: skip
    losses, rates = rank_tables(both)
    eight = [r for r in records if r["learning_rate"] in SIX]
    for column, mine in ((1, one), (2, eight)):
        gaps = second.gaps([*mine], "auto", "test", "loss") if column == 2 else _gaps_of_two(one)
        mean, half = second.mean_and_half(np.array([(a - b).mean() for a, b in gaps[:2]]))
        expected = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] (2 x 4)"
        assert row_of(losses, "auto")[column] == expected
        best = {p.rate for p in pairs(cells_of(mine), "auto") if p.task in TASKS[:2]}
        assert best == {1e-3}
        assert row_of(rates, "auto")[column] == "0.001"
    # Rank 8 is read at the six rates that the others have, so PiSSA's best is their lowest, though the first
    # seed's of all nine is below.
    first = [r for r in both if r["seed"] == 0]
    assert {p.rate for p in pairs(cells_of(r for r in first if r["rank"] == 8), "pissa")} == {5e-5}
    for seeds in (both, first):
        assert row_of(rank_tables(seeds)[1], "pissa")[1:] == ["0.0001", "0.0001"]
    # One rank alone is no table.
    assert rank_tables(records) == []


def _gaps_of_two(records: list[Record]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`second.gaps` of records on the first two tasks alone."""
    filled = [
        *records,
        *({**r, "task": task} for r in records for task in TASKS[2:] if r["task"] == TASKS[0]),
    ]
    return second.gaps(filled, "auto", "test", "loss")


LINES = [
    *(
        {"model": "m", "task": task, "step_seconds": seconds, "device": "card"}
        for task in TASKS
        for seconds in (0.1, 0.02, 0.03)
    ),
    {"model": "m", "task": "gcd", "label": "auto", "start_seconds": 2.5, "device": "card"},
    {"model": "m", "task": "gcd", "label": "vanilla", "start_seconds": 0.5, "device": "card"},
    {"model": "other", "task": "gcd", "step_seconds": 9.0, "device": "else"},
    # Another device is not mixed in, however much it has measured.
    *({"model": "m", "task": task, "step_seconds": 7.0, "device": "slow"} for task in TASKS * 4),
    {"model": "m", "task": "gcd", "label": "auto", "start_seconds": 90.0, "device": "slow"},
]  # fmt: skip


def test_cost_is_steps_to_plain_loras_final_loss_and_what_they_take(records: list[Record]) -> None:
    cells, times = cells_of(records), StepTimes.of(LINES, "m")
    assert times.steps == dict.fromkeys(TASKS, 0.03)
    assert times.device == "card"
    expected = []
    for found in pairs(cells, "auto"):
        own = [
            second.first_below(a["heldout"]["loss"], b["heldout"]["loss"][-1])
            for a, b in zip(found.mine, found.base, strict=True)
        ]
        cost = cost_of(found, times, "auto")
        assert cost.shares == pytest.approx(own, abs=1e-4)
        # The start was timed alone on one task; of the others its median.
        assert (cost.start, cost.start_alone, cost.steps) == (2.0, True, STEPS[-1])
        assert cost.seconds == pytest.approx(2.0 + np.median(own) * 16 * 0.03, abs=1e-3)
        if np.median(own) < 1:
            assert cost.pays_from == pytest.approx(2.0 / ((1 - np.median(own)) * 0.03), rel=1e-2)
        expected.append(own)
    row = row_of(cost_table(cells, times), "auto")
    reached = np.isfinite(np.concatenate(expected)).sum()
    assert row[2] == f"{reached} of 16"
    assert row[3] == f"{100 * np.median([np.median(x) for x in expected]):.0f}%"
    assert (row[4], row[5], row[7]) == ("2.00", "4", "0.48")
    # Without it: the records' own, marked; seconds of steps are not guessed.
    row = row_of(cost_table(cells, StepTimes()), "auto")
    assert (row[4], row[5:]) == ("4.00*", ["0", "–", "–", "–"])
    # A line that never gets there.
    worse = [r for r in records if r["label"] != "pissa"] + [
        {**r, "heldout": {"steps": list(STEPS), "loss": [9.0] * 4}, "init_seconds": 0.1}
        for r in records if r["label"] == "pissa"
    ]  # fmt: skip
    row = row_of(cost_table(cells_of(worse), times), "pissa")
    assert row[2:4] == ["0 of 8", "never"]
    # Its start is the records', of whatever device they ran on: it is not added to timed steps.
    assert (row[4], row[5:]) == ("-0.15*", ["0", "–", "–", "–"])
    alone = {"model": "m", "task": "gcd", "label": "pissa", "start_seconds": 0.4, "device": "card"}
    row = row_of(cost_table(cells_of(worse), StepTimes.of([*LINES, alone], "m")), "pissa")
    assert (row[6], row[8]) == ("never", "never")


def test_the_page_of_a_model(records: list[Record], tmp_path: Path) -> None:
    fresh = [{**r, "task": f"fresh_{r['task']}", "id": f"fresh-{r['id']}"} for r in records]
    plain = [
        {**r, "task": "aiw", "id": f"aiw-{r['id']}"} for r in records if r["label"] == "vanilla"
    ]
    ranks = [r for r in made(rank=32) if r["task"] in TASKS[:2]]
    sentences = [
        {**r, "task": {"gcd": "movies", "chain_sum": "tweets"}[r["task"]]}
        for r in made(model="all-minilm-l6-v2") if r["task"] in ("gcd", "chain_sum")
    ]  # fmt: skip
    everything = [*records, *fresh, *plain, *ranks, *sentences, {**records[0], "stage": "seeds"}]
    steps = tmp_path / "steps.jsonl"
    named = [{**line, "model": "smollm2-135m-instruct"} for line in LINES]
    steps.write_text("".join(json.dumps(line) + "\n" for line in named))
    written = write_grids(everything, tmp_path, steps)
    assert {path.name for path in written} == {
        "grid-all-minilm-l6-v2.md", "rate-by-method-all-minilm-l6-v2.png",
        "grid-smollm2-135m-instruct.md", "rate-by-method-smollm2-135m-instruct.png",
    }  # fmt: skip
    text = (tmp_path / "grid-smollm2-135m-instruct.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("#")]
    for name in (
        "in both forms",
        "nine rates alone",
        "By task",
        "Forgetting",
        "Cost",
        "Ranks",
        "Fresh",
    ):
        assert sum(name in head for head in heads) == 1, name
    assert "Steps of one adapter alone on card" in text
    assert "exact match" in text
    assert "accuracy" not in text
    # Tasks that were not chosen are apart: those that other lines ran are fresh, `aiw` is not compared.
    main, _, rest = text.partition("## Fresh")
    assert "fresh_gcd" not in main.partition("## Against plain LoRA")[2]
    assert "fresh_basic_arithmetic, fresh_chain_sum, fresh_count_bits, fresh_gcd." in rest
    assert "aiw" not in rest
    assert row_of(main.partition("## Against")[2], "auto")[1] == "4 x 4"
    page = (tmp_path / "grid-all-minilm-l6-v2.md").read_text()
    assert "exact match" not in page
    assert "accuracy, points" in page
    assert "Tasks, all of this model's: movies, tweets." in page
    assert "No unstacked step was timed" in page
    # Too few runs: the page says so.
    (few,) = by_grid_model([r for r in records if r["label"] == "vanilla"])
    assert "Too few runs for a comparison" in grid_report(few, StepTimes())


def test_one_command_makes_the_grids_tables_too(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "records" / "grid.jsonl"
    kept.parent.mkdir()
    kept.write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["x", "--records", str(tmp_path), "--out", str(out)])
    analyze.main()
    assert {path.name for path in out.iterdir()} == {
        "grid-smollm2-135m-instruct.md", "rate-by-method-smollm2-135m-instruct.png",
    }  # fmt: skip


def test_the_choice_of_tasks_stays_what_it_was() -> None:
    """The rule, on the kept runs of plain LoRA at all nine rates, takes the tasks that were chosen."""
    kept = [
        r
        for r in read_records([RESULTS]).values()
        if r["stage"] == "grid"
        and r["rank"] == 8
        and r["experiment"]["model"] == "smollm2-135m-instruct"
    ]
    found = {room.task: room.has_room for room in rooms(kept)}
    assert all(found[task] for task in CHOSEN)
    # Seeds at some rates have no say.
    more = [{**r, "seed": 7} for r in kept if r["learning_rate"] in GRID[2:8]]
    assert rooms([*kept, *more]) == rooms(kept)
