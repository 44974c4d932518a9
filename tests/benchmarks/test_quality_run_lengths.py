"""Runs of several lengths beside plain LoRA, by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.analysis.run_lengths import by_length, length_table, regret_table

RATES = (1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3, 4.6e-3)


def runs(
    label: str,
    steps: int,
    task: str,
    *losses: float,
    stage: str = "steps",
    rank: int = 8,
    warmup: float | None = None,
) -> list[dict[str, Any]]:
    """One run at each rate; the loss without an adapter is 3."""
    if warmup is None:
        warmup = 0.1 if stage == "steps" else 0.03
    return [
        {
            "stage": stage, "label": label, "task": task, "learning_rate": rate, "seed": 0, "rank": rank,
            "experiment": {"steps": steps, "model": "m", "warmup": warmup},
            "heldout": {"steps": [0], "loss": [3.0]},
            "test": {"loss": loss + 0.25, "exact": 1 - loss / 4, "sequences": 4, "items": "f0"},
            "validation": {"loss": loss},
        }
        for rate, loss in zip(RATES, losses, strict=True)
    ]  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


RECORDS = [
    *runs("vanilla", 16, "a", 2.0, 1.8, 1.6, 1.4, 1.2, 1.3),
    *runs("vanilla", 16, "b", 2.0, 1.8, 1.6, 1.4, 1.2, 1.3),
    *runs("auto", 16, "a", 1.5, 1.3, 1.2, 1.0, 1.1, 1.4),
    *runs("auto", 16, "b", 1.7, 1.5, 1.2, 1.2, 1.0, 1.4),
    *runs("vanilla", 128, "a", 1.0, 0.9, 0.8, 0.7, 0.8, 0.9, stage="grid"),
    *runs("auto", 128, "a", 1.0, 0.9, 0.8, 0.9, 1.0, 1.1, stage="grid"),
    # Another rank, another stage, other schedules.
    *runs("auto", 16, "a", *(9.0,) * 6, warmup=0.03),
    *runs("auto", 128, "a", *(9.0,) * 6, stage="grid", warmup=0.1),
    *runs("auto", 16, "a", *(9.0,) * 6, rank=32),
    *runs("auto", 16, "a", *(9.0,) * 6, stage="suggested"),
]


def test_each_length_by_itself_tuned_and_at_fixed_rates() -> None:
    first, second = rows_of(length_table(by_length(RECORDS), {"auto": "Auto", "eva": "EVA"}))
    # Best 1.0 beside 1.2 on both; at 1e-4 0.5 and 0.3 below, at 1e-3 0.4 and 0.2.
    assert first[:3] == ["16", "Auto", "2 x 1"]
    assert [first[i].split()[0] for i in (3, 4, 6, 7)] == ["-0.200", "+5.0", "-0.400", "-0.300"]
    assert first[5] == "2"
    assert second[:3] == ["128", "Auto", "1 x 1"]
    assert [second[i].split()[0] for i in (3, 6, 7)] == ["+0.100", "+0.000", "+0.200"]


def test_regret_of_the_law_at_each_length() -> None:
    said = [
        {
            "experiment": {"model": "m"}, "task": task, "label": "auto", "rank": 8,
            "suggestion": {"two_steps": 1e-3},
        }
        for task in ("a", "b")
    ]  # fmt: skip
    rows = rows_of(
        regret_table(by_length(RECORDS), said, {"auto": "Auto", "vanilla": "plain"}, float)
    )
    # At 1e-3: nothing lost on one task and 0.2 of 2.0 on the other; later 0.1 of 2.2.
    assert rows == [
        ["16", "Auto", "2", "5.0%", "9.0%", "10.0%", "1.0e-03", "1.5e-03"],
        ["128", "Auto", "1", "4.5%", "4.5%", "4.5%", "1.0e-03", "4.5e-04"],
    ]
