"""Lines at their suggested rates beside plain LoRA, by hand."""

from __future__ import annotations

from benchmarks.quality.analysis.suggested_runs import suggested_table


def run(
    label: str,
    task: str,
    seed: int,
    loss: float,
    exact: float,
    rate: float,
    stage: str = "suggested",
):
    return {
        "stage": stage, "rank": 8, "task": task, "label": label, "seed": seed,
        "learning_rate": rate, "test": {"loss": loss, "exact": exact},
    }  # fmt: skip


def test_pairs_of_seeds_means_over_tasks_and_what_is_worse_beyond_chance():
    records = [
        *(run("vanilla", "a", s, 1.0 + 0.001 * s, 0.5, 4e-3) for s in range(3)),
        *(run("auto", "a", s, 1.5 + 0.001 * s, 0.4, 1e-3) for s in range(3)),
        # A seed that plain LoRA has not, and another stage's run, count for nothing.
        run("auto", "a", 7, 99.0, 0.0, 1e-3),
        run("auto", "a", 0, 99.0, 0.0, 1e-3, stage="grid"),
        *(run("vanilla", "b", s, 2.0 + s, 0.2, 1e-3) for s in range(2)),
        *(run("auto", "b", s, 1.9 + s, 0.4, 1e-3) for s in range(2)),
    ]
    (row,) = suggested_table(records).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # Gaps of +0.5 and -0.1: mean 0.2; points -10 and +20: mean 5; the first is worse beyond chance.
    assert cells[:2] == ["8", "2 x 2"]
    assert cells[2].startswith("+0.200 [")
    assert cells[3].startswith("+5.0 [")
    assert cells[4:6] == ["1", "1"]
    assert cells[7] == "1.0e-03, 2.0e-03"
