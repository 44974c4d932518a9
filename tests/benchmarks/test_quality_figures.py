"""The figures of budgets, of speed and of forgetting show what the records say."""

from __future__ import annotations

import pytest
from benchmarks.quality.analysis.budget_figures import sweeps
from benchmarks.quality.analysis.lines import collect_lines
from benchmarks.quality.analysis.speed_figures import speed_and_forgetting
from benchmarks.quality.analysis.sweeps import sweeps_of
from matplotlib import pyplot

from tests.benchmarks.test_quality_analysis import record


@pytest.fixture
def axes(monkeypatch):
    """The panels of the figure that was made last."""
    seen = {}
    monkeypatch.setattr(pyplot, "close", lambda figure: seen.update(axes=figure.axes))
    return seen


def at(rank: int, method: str, exact: float) -> list[dict]:
    made = [record(method, seed, 1e-3, exact, [3.0, 1.0]) for seed in range(2)]
    return [
        r
        | {
            "experiment": r["experiment"] | {"rank": rank},
            "stage": "seeds" if rank == 8 else "sweep",
        }
        for r in made
    ]


def test_points_above_plain_lora_at_every_rank(axes, tmp_path):
    records = [r for rank in (1, 8, 64) for r in at(rank, "vanilla", 0.5)]
    records += at(1, "natural", 0.48) + at(8, "natural", 0.53) + at(64, "natural", 0.5)
    # One rank alone makes no line.
    records += at(8, "eva", 0.9)
    path = sweeps(sweeps_of(records), tmp_path / "budgets.png")
    assert path.stat().st_size > 0
    (axis,) = axes["axes"]
    drawn = {line.get_label(): line for line in axis.lines}
    assert set(drawn) == {"vanilla", "natural"}
    assert list(drawn["natural"].get_xdata()) == [1, 8, 64]
    assert list(drawn["natural"].get_ydata()) == pytest.approx([-2, 3, 0])
    assert list(drawn["vanilla"].get_ydata()) == [0, 0, 0]


def test_speed_and_forgetting(axes, tmp_path):
    records = []
    for seed in range(3):
        for method, losses, after in (
            ("vanilla", [3.0, 2.0, 1.0], 2.5),
            ("natural", [2.0, 1.0, 0.5], 2.25),
            ("eva", [3.0, 2.0, 1.5], 2.0),
        ):
            other = {"other": {"loss": after, "exact": 0.0, "start_loss": 2.0}}
            records.append(record(method, seed, 1e-3, 0.5, losses) | other)
    path = speed_and_forgetting(collect_lines(records), records, tmp_path / "speed.png")
    assert path.stat().st_size > 0
    shown = []
    for axis in axes["axes"]:
        points = [line for line in axis.lines if line.get_marker() in ("o", "x")]
        shown.append([(float(x.get_xdata()[0]), x.get_marker()) for x in points])
    # In the order of the methods: vanilla, eva, natural.
    start, steps, seconds, rise = shown
    assert start == [(3.0, "o"), (3.0, "o"), (2.0, "o")]
    assert [m for _, m in steps] == ["o", "x", "o"]
    assert (steps[0][0], steps[2][0]) == pytest.approx((100, 50))
    assert (seconds[0][0], seconds[2][0]) == pytest.approx((11.0, 6.0))
    assert [x for x, _ in rise] == pytest.approx([0.5, 0.0, 0.25])
