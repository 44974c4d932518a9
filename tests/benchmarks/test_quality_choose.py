"""Tasks are chosen by plain LoRA's records alone: room, and little noise between seeds."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.choose import chosen, rooms, table


def record(
    task: str, rate: float, seed: int, loss: float, exact: float, label: str = "vanilla"
) -> Any:
    return {
        "stage": "grid", "task": task, "label": label, "learning_rate": rate, "seed": seed,
        "validation": {"loss": loss}, "test": {"loss": loss, "exact": exact},
        "heldout_at_percent": {"0": 2.0},
    }  # fmt: skip


def runs(task: str, noise: float, exact: float = 0.4, best: float = 1e-3) -> list[Any]:
    return [
        record(task, rate, seed, 1.0 + (rate != best) + noise * seed, exact)
        for rate in (1e-4, 1e-3, 1e-2)
        for seed in (0, 1)
    ]


def test_quiet_tasks_with_room_are_taken() -> None:
    records = [
        *runs("quiet", 0.001), *runs("loud", 0.2), *runs("floor", 0.0, exact=0.01),
        *runs("ceiling", 0.0, exact=0.99), *runs("edge", 0.0, best=1e-2), *runs("middle", 0.01),
    ]  # fmt: skip
    found = rooms(records)
    assert chosen(found, 9) == ["quiet", "middle", "loud"]
    assert chosen(found, 2) == ["quiet", "middle"]
    text = table(found, ["quiet", "middle"])
    assert "| floor |" in text
    assert text.count("no room") == 3
    assert text.count("noisier") == 1


def test_no_other_methods_record_is_read() -> None:
    records = runs("quiet", 0.001)
    others = [{**r, "label": "auto", "test": {"loss": 0.0, "exact": 1.0}} for r in records]
    assert rooms([*records, *others]) == rooms(records)
    # One seed says nothing of noise.
    assert rooms([r for r in records if r["seed"] == 0]) == []
