"""The picture of the README: ``python -m benchmarks.published.figure`` writes ``docs/images/gains.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.cache import REPOSITORY
from benchmarks.common.figures import STYLE
from benchmarks.published.rate_blocks import matched_at
from benchmarks.published.sources import at_rate, recovered_on_text
from benchmarks.quality.experiment import GRID
from benchmarks.quantized.recovery_tables import share_gone

PICTURE = REPOSITORY / "docs" / "images" / "gains.png"

MATCHED = (1e-4, 2e-4, 1e-3)
"""Rates that starts were told."""

_LINES = (
    ("both sides", "KroneckerQER (labels)", "#009e73"),
    ("QERA", "QERA (inputs alone)", "#0072b2"),
    ("LoftQ", "LoftQ's step (no data)", "#9ca3af"),
)


def draw(path: Path = PICTURE) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
        _recovered(left)
        _rates(right)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        plt.close(figure)


def _recovered(axes: Any) -> None:
    """Share of the loss that NF4 cost and that a start gives back, by rank."""
    for method, label, color in _LINES:
        members = sorted(
            (r["rank"], 100 * share_gone(r, "loss"))
            for r in recovered_on_text("nf4")
            if r["method"] == method
        )
        ranks, shares = zip(*members, strict=True)
        axes.plot(ranks, shares, color=color, label=label, linewidth=2, marker="o", markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
    axes.set(xlabel="rank", ylim=(0, 100), ylabel="% of the lost loss given back")
    axes.set_title("A 4-bit base, before any training")
    axes.legend(loc="center right")


def _rates(axes: Any) -> None:
    """Auto's test loss beside plain LoRA's at every rate, as it is and told the rate."""
    as_it_is = {rate: at_rate("auto", rate) for rate in GRID[:-1]}
    told = {rate: matched_at("auto", rate) for rate in MATCHED}
    axes.axhline(0.0, color="#4b5563", linewidth=1)
    for means, label, color in (
        (as_it_is, "Auto", "#009e73"),
        (told, "Auto, matched to the rate", "#d55e00"),
    ):
        low, high = ([getattr(m, end) for m in means.values()] for end in ("low", "high"))
        axes.fill_between(list(means), low, high, color=color, alpha=0.15, linewidth=0)
        values = [m.value for m in means.values()]
        axes.plot(
            list(means), values, color=color, linewidth=2, marker="o", markersize=5, label=label
        )
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="nats per token")
    axes.set_title(f"Test loss beside plain LoRA's, {told[MATCHED[0]].tasks} tasks")
    axes.annotate(
        "plain LoRA at the same rate",
        (GRID[0], 0.0),
        xytext=(0, 4),
        textcoords="offset points",
        color="#4b5563",
    )
    axes.legend(loc="lower right")


if __name__ == "__main__":
    draw()
