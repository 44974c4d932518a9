"""Tables of starts that are told their rate, of rows of other sizes and of a longer warmup, by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.analysis.matched_runs import by_line, by_rank, by_rate, by_size, by_warmup
from benchmarks.quality.analysis.rate_grid import cells_of


def run(
    stage: str,
    label: str,
    task: str,
    rate: float,
    loss: float,
    seed: int = 0,
    *,
    rank: int = 8,
    warmup: float = 0.03,
    held: tuple[float, ...] = (3.0, 2.0, 1.0),
    validation: float | None = None,
) -> dict[str, Any]:
    return {
        "stage": stage, "label": label, "task": task, "learning_rate": rate, "seed": seed, "rank": rank,
        "test": {"loss": loss, "exact": 0.0},
        "validation": {"loss": loss if validation is None else validation},
        "experiment": {"warmup": warmup, "steps": 20},
        "heldout": {"steps": [0, 1, 20], "loss": list(held)},
    }  # fmt: skip


def rows_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def grid() -> list[dict[str, Any]]:
    """Plain LoRA is best at 1e-3 on both tasks: 1.0 and 2.0; half a nat above at 1e-4."""
    return [
        run("grid", "vanilla", task, rate, best + above)
        for task, best in (("a", 1.0), ("b", 2.0))
        for rate, above in ((1e-4, 0.5), (1e-3, 0.0))
    ]


def cells(records: list[dict[str, Any]]) -> Any:
    return cells_of(records, rates=(1e-4, 1e-3))


def test_told_beside_plain_lora_at_the_rate_and_at_its_best() -> None:
    records = [
        *grid(),
        *(run("grid", "auto", t, 1e-4, v) for t, v in (("a", 1.4), ("b", 2.6))),
        *(run("matched", "auto(matched=True)", t, 1e-4, v) for t, v in (("a", 1.1), ("b", 1.9))),
        *(run("matched", "vanilla(matched=True)", t, 1e-4, v) for t, v in (("a", 1.2), ("b", 2.2))),
        # A second seed is part of its task's mean.
        run("grid", "vanilla", "a", 1e-4, 1.6, seed=1),
        run("matched", "auto(matched=True)", "a", 1e-4, 1.0, seed=1),
        # Another rank, another schedule and a seed that plain LoRA has not count for nothing.
        run("matched", "auto(matched=True)", "a", 1e-4, 9.0, rank=32),
        run("matched", "auto(matched=True)", "a", 1e-4, 9.0, warmup=0.1),
        run("matched", "auto(matched=True)", "a", 1e-4, 9.0, seed=4),
    ]
    (row,) = rows_of(by_rate(records, cells(records)))
    # Gaps of 1.1 - 1.5 and 1.0 - 1.6 on one task, and of 1.9 - 2.5 on the other.
    assert row[0] == "0.0001"
    assert row[1].startswith("-0.550 [")
    assert row[2:] == ["2 of 2", "+0.000", "-0.300", "+0.000"]


def test_lines_that_are_told_a_rate_beside_plain_lora_with_and_without_it() -> None:
    records = [
        *grid(),
        *(run("grid", "eva", t, 1e-4, v) for t, v in (("a", 1.4), ("b", 2.6))),
        *(run("matched", "eva(matched=True)", t, 1e-4, v) for t, v in (("a", 1.1), ("b", 1.9))),
        *(run("matched", "vanilla(matched=True)", t, 1e-4, v) for t, v in (("a", 1.2), ("b", 2.2))),
        # Not a first seed, not that rate.
        run("matched", "eva(matched=True)", "a", 1e-4, 9.0, seed=1),
        run("grid", "eva", "a", 1e-4, 9.0, seed=1),
        run("grid", "vanilla", "a", 1e-4, 1.5, seed=1),
        run("matched", "eva(matched=True)", "a", 1e-3, 9.0),
    ]
    (row,) = rows_of(by_line(records, {"eva": "EVA"}, 1e-4))
    assert row[0] == "EVA"
    # 1.4 - 1.5 and 2.6 - 2.5; 1.1 - 1.5 and 1.9 - 2.5; 1.1 - 1.2 and 1.9 - 2.2.
    assert [cell.split()[0] for cell in row[1:]] == ["+0.000", "-0.500", "-0.200"]


def test_one_rate_for_ranks_and_what_the_first_step_does() -> None:
    def told(label: str, task: str, loss: float, held: tuple[float, ...]) -> dict[str, Any]:
        return run(
            "matched", f"{label}(matched=True)", task, 2e-4, loss, rank=32, warmup=0.1, held=held
        )

    records = [
        told("auto", "a", 1.0, (2.0, 2.0, 9.0)),
        told("auto", "b", 2.0, (2.0, 2.5, 9.0)),
        told("vanilla", "a", 1.2, (4.0, 4.0, 0.0)),
        told("vanilla", "b", 2.4, (6.0, 3.0, 0.0)),
    ]
    (row,) = rows_of(by_rank(records))
    # The first tenth of 20 steps are the first two measurements: 2 beside 4, and 2.25 beside 4.5.
    assert row[:3] == ["32", "1.500", "1.800"]
    assert row[3].startswith("-0.300 [")
    assert row[4:] == ["2 of 2", "1 of 2", "-50%"]


def test_sizes_at_every_rate_above_the_best_of_plain_lora() -> None:
    records = [
        *grid(),
        *(run("sizes", "vanilla(size=4.0)", t, 1e-4, v) for t, v in (("a", 1.1), ("b", 2.3))),
        # Not on all tasks: no mean.
        run("sizes", "vanilla(size=4.0)", "a", 1e-3, 5.0),
        run("sizes", "vanilla(size=4.0)", "a", 1e-4, 9.0, warmup=0.1),
    ]
    lines = {"plain": {1.0: "vanilla", 4.0: "vanilla(size=4.0)"}}
    assert rows_of(by_size(records, cells(records), lines)) == [
        ["plain", "1", "+0.500", "+0.000"],
        ["plain", "4", "+0.200", ""],
    ]


def test_a_longer_warmup_at_the_best_of_the_same_rates() -> None:
    records = [
        *grid(),
        # Best under the shorter one, and not run under the longer.
        *(run("grid", "vanilla", task, 5e-3, 0.1) for task in "ab"),
        *(
            run("sizes", "vanilla", t, rate, v, warmup=0.1, held=(2.0, held, 0.0), validation=v)
            for t, rate, v, held in (
                ("a", 1e-4, 1.3, 1.0),
                ("a", 1e-3, 1.4, 9.0),
                ("b", 1e-4, 2.6, 9.0),
                ("b", 1e-3, 2.1, 3.0),
            )
        ),
    ]
    (row,) = rows_of(by_warmup(records, {"plain": "vanilla"}))
    # 1.3 - 1.0 and 2.1 - 2.0; of the longer ones the first step of the chosen runs falls, and rises.
    assert row[0] == "plain"
    assert row[1].startswith("+0.200 [")
    assert row[2:] == ["2.50, 2.00", "1 of 2"]
