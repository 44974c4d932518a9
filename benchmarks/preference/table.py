"""Reward margin, accuracy and loss of every method, at its best rate and at the suggested one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.preference.plan import best_rate
from benchmarks.preference.training import SUGGESTED
from benchmarks.quality.analysis.intervals import bootstrap, mean, sign_flip

MEASURES = {
    "margin": "test_margins",
    "accuracy": "test_accuracies",
    "loss": "test_loss",
}
COMPARED = "vanilla"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Means over seeds on the test pairs with 95% intervals, and paired differences to plain LoRA's best rate.

    The best rate of a method is that of the lowest loss on the validation pairs.
    """
    methods = list(dict.fromkeys(r["method"] for r in records))
    tried = sorted({r["asked_rate"] for r in records} - {SUGGESTED}, key=float)
    plain = _rows(records, COMPARED, best_rate(records, COMPARED))
    heads = ["method", "rate", "seeds", *MEASURES, *(f"{name} - plain" for name in MEASURES)]
    lines = ["| " + " | ".join([*heads, "p (loss)"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for method in methods:
        for kind, rate in (("best", best_rate(records, method)), (SUGGESTED, SUGGESTED)):
            rows = _rows(records, method, rate)
            if not rows:
                continue
            used = mean([row["rate"] for row in rows.values()])
            edge = ", edge of the grid" if rate in (tried[:1] + tried[-1:]) else ""
            cells = [method, f"{used:.2g} ({kind}{edge})", str(len(rows))]
            cells += [_with_interval([r[key] for r in rows.values()]) for key in MEASURES.values()]
            common = [] if rows == plain else sorted(rows.keys() & plain.keys())
            for key in MEASURES.values():
                apart = [rows[seed][key] - plain[seed][key] for seed in common]
                cells.append(_with_interval(apart, sign="+") if apart else "-")
            losses = [rows[seed]["test_loss"] - plain[seed]["test_loss"] for seed in common]
            cells.append(f"{sign_flip(losses):.3f}" if losses else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(
    records: Sequence[dict[str, Any]], method: str, rate: str | None
) -> dict[int, dict[str, Any]]:
    """The finished runs of a method at a rate, by seed."""
    return {
        r["seed"]: r
        for r in records
        if r["method"] == method and r["asked_rate"] == rate and "test_loss" in r
    }


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    low, high = bootstrap(values)
    interval = "" if math.isnan(low) else f" [{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{mean(values):{sign}.4f}{interval}"


def by_rate(records: Sequence[dict[str, Any]]) -> str:
    """Mean test loss of every method at every rate, over the seeds that all of its rates have."""
    rates = sorted({r["asked_rate"] for r in records} - {SUGGESTED}, key=float)
    lines = ["| method | seeds | " + " | ".join(rates) + " |", "|---" * (len(rates) + 2) + "|"]
    for method in dict.fromkeys(r["method"] for r in records):
        rows = [_rows(records, method, rate) for rate in rates]
        common = sorted(set.intersection(*(set(found) for found in rows)))
        losses = [mean([found[seed]["test_loss"] for seed in common]) for found in rows]
        cells = [f"{loss:.4f}" for loss in losses] if common else ["-"] * len(rates)
        lines.append(f"| {method} | {len(common)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
