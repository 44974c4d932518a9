"""Blocks of figures on the pages are what the kept records say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.published import head_blocks, pages, sources
from benchmarks.published.blocks import BLOCKS
from benchmarks.quality.analysis.t_tests import Mean


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_no_block_is_stale(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.stale(text) == []
    # A digit that somebody changed by hand is noticed, and put right.
    name = re.search(r"<!-- figures: ([\w-]+) -->", text)
    assert name is not None
    place = re.compile(r"\d(?=%|\])").search(text, name.end())
    assert place is not None
    wrong = text[: place.start()] + str((int(place[0]) + 1) % 10) + text[place.end() :]
    assert pages.stale(wrong) == [name[1]]
    assert pages.with_blocks(wrong) == text


def test_every_block_stands_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert set(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == set(BLOCKS)


def test_a_mean_says_its_interval() -> None:
    mean = Mean.of([-1.0, 0.0, 1.0])
    # t(0.975, 2) = 4.303, standard error 1 / sqrt(3)
    assert str(mean) == "+0.000 [-2.484, +2.484]"
    assert (mean.below, mean.tasks) == (1, 3)


def run(loss: float) -> dict[str, Any]:
    split = {"loss": loss, "exact": 0.5}
    return {"test": split, "validation": split}


def test_differences_are_of_the_same_rate_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks, by hand: line less plain LoRA, seeds that both have, the mean over tasks."""
    cells = {
        "a": {
            "vanilla": {1e-4: {0: run(2.0), 1: run(4.0)}, 1e-3: {0: run(1.0), 1: run(1.0)}},
            "auto": {
                1e-4: {0: run(1.5), 1: run(3.0), 2: run(99.0)},
                1e-3: {0: run(1.0), 1: run(1.5), 2: run(9.0)},
            },
        },
        "b": {
            "vanilla": {1e-4: {0: run(1.0)}, 1e-3: {0: run(3.0)}},
            "auto": {1e-4: {0: run(1.25)}, 1e-3: {0: run(2.0)}},
        },
        "c": {"vanilla": {1e-4: {0: run(0.0)}, 1e-3: {0: run(0.0)}}},
    }
    monkeypatch.setattr(sources, "grid_cells", lambda model="": cells)
    low = sources.at_rate("auto", 1e-4)
    assert (low.value, low.below, low.tasks) == (pytest.approx((-0.75 + 0.25) / 2), 1, 2)
    assert sources.at_rate("auto", 1e-3, cells).value == pytest.approx((0.25 - 1.0) / 2)
    # Each at its own best: a at 1e-3 both, b at 1e-4 both.
    assert sources.tuned("auto").value == pytest.approx((0.25 + 0.25) / 2)


def head_run(
    task: str, rate: float, loss: float, stage: str = "heads", seen: int = 64, **settings: Any
) -> dict[str, Any]:
    label = "vanilla" if stage == "grid" else f"vanilla(fitted={settings.get('fitted')})"
    experiment = {"settings": settings, "statistics_samples": seen, "train_samples": 512}
    split = {"loss": loss, "exact": 1 - loss / 4, "sequences": 4, "items": "f0"}
    return {
        "stage": stage, "task": task, "label": label, "method": "vanilla", "seed": 0,
        "learning_rate": rate, "experiment": experiment, "test": split, "validation": split,
    }  # fmt: skip


def test_heads_are_told_apart_by_part_and_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: each line at the rates that it ran, plain LoRA at the same."""
    plain = {"a": {1e-4: 3.0, 1e-3: 2.0, 1e-2: 0.5}, "b": {1e-4: 2.0, 1e-3: 1.0, 1e-2: 0.5}}
    records = [head_run(t, r, loss, "grid") for t, by in plain.items() for r, loss in by.items()]
    for part, seen, gain in ((0.25, 64, 0.5), (0.25, 256, 0.75), (1.0, 64, -0.25)):
        for task, losses in plain.items():
            for rate in (1e-4, 1e-3):
                loss = losses[rate] - gain
                records.append(head_run(task, rate, loss, seen=seen, fitted=part))
    # A line without a head of its own is none of these.
    records.append(head_run("a", 1e-4, 9.0, fitted=False))
    monkeypatch.setattr(head_blocks, "own_records", lambda model: records)
    monkeypatch.setattr(head_blocks, "_MODELS", {"m": "data"})
    assert list(head_blocks.head_cells("m")) == [(0.25, 256), (0.25, 512), (1.0, 256)]
    _, _, *rows = head_blocks.parts_of_heads().splitlines()
    cells = [[c.strip() for c in row.split("|")[1:-1]] for row in rows]
    assert [row[:4] for row in cells] == [
        ["data", "0.25", "256", "2 x 1"],
        ["data", "0.25", "512", "2 x 1"],
        ["data", "1", "256", "2 x 1"],
    ]
    assert [row[4].split()[0] for row in cells] == ["-0.500", "-0.750", "+0.250"]
    assert [row[6].split()[0] for row in cells] == ["-0.500", "-0.750", "+0.250"]
