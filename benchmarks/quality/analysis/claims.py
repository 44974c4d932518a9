"""What the papers claim of their starts, asked of the records.

A claim holds where the 95% interval of its paired difference to plain LoRA lies on its side of zero,
fails where it lies on the other, and is open otherwise: few runs cannot make a claim hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.quality.analysis.intervals import mean, stratified
from benchmarks.quality.analysis.lines import Line, Lines, collect_lines, ordered, paired
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE


def verdict(low: float, high: float) -> str:
    """In a word, from an interval of "how much better"."""
    if math.isnan(low):
        return "open (too few seeds)"
    return "held" if low > 0 else "did not hold" if high < 0 else "open"


def claims_table(lines: Lines, rank_records: Iterable[Record] = ()) -> str:
    """One row a method: final score, speed, steadiness, ranks, overhead."""
    ranks = _ranks(rank_records)
    rows = []
    for label in ordered({label for _, label in lines}):
        pairs = [
            (lines[task, name], lines[task, BASELINE])
            for task, name in sorted(lines)
            if name == label and (task, BASELINE) in lines
        ]
        if label == BASELINE or not pairs:
            continue
        share = mean([mean(a.init_seconds) / mean(a.train_seconds) for a, _ in pairs])
        rows.append(
            [
                label,
                _judge([[100 * d for d in paired(a, b)] for a, b in pairs], "points"),
                _judge([_sooner(a, b) for a, b in pairs], "of the mean loss over the run"),
                _steadier([(a.exact, b.exact) for a, b in pairs]),
                ranks.get(label, "–"),
                f"{100 * share:.0f}%",
            ]
        )
    header = [
        "method", "higher final score", "faster: lower loss over the run",
        "steadier: smaller spread over seeds", "ranks at which above plain LoRA",
        "start, share of the training time",
    ]  # fmt: skip
    return table(header, rows)


def _judge(groups: Sequence[Sequence[float]], unit: str) -> str:
    average = mean([mean(g) for g in groups])
    low, high = stratified(groups)
    interval = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"{verdict(low, high)}: {average:+.2f}{interval} {unit}"


def _sooner(line: Line, base: Line) -> list[float]:
    """By how much the mean held-out loss over the run is lower, as a share of plain LoRA's."""
    at = dict(zip(base.seeds, base.area, strict=True))
    return [1 - a / at[s] for s, a in zip(line.seeds, line.area, strict=True) if s in at]


def _steadier(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 4000
) -> str:
    """Log ratio of standard deviations over seeds, mean over tasks, by a paired bootstrap."""
    usable = [(np.array(a), np.array(b)) for a, b in pairs if len(a) == len(b) and len(a) > 2]
    if not usable:
        return "open (too few seeds)"
    generator = np.random.default_rng(0)
    total = np.zeros(resamples)
    ratio = 0.0
    # A spread of zero would make the logarithm infinite: half an answer of a thousand is nothing.
    floor = 5e-4
    for a, b in usable:
        rows = generator.integers(0, len(a), (resamples, len(a)))
        spread = [np.maximum(x[rows].std(1, ddof=1), floor) for x in (a, b)]
        total += np.log(spread[1] / spread[0]) / len(usable)
        ends = [max(float(x.std(ddof=1)), floor) for x in (a, b)]
        ratio += math.log(ends[1] / ends[0]) / len(usable)
    low, high = np.quantile(total, (0.025, 0.975))
    return f"{verdict(low, high)}: {math.exp(-ratio):.2f} of plain LoRA's"


def _ranks(records: Iterable[Record]) -> dict[str, str]:
    """Of the ranks that were swept, those at which the mean over tasks is above plain LoRA's."""
    by_rank: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_rank[record["rank"]].append(record)
    above: dict[str, list[str]] = defaultdict(list)
    for rank in sorted(by_rank):
        lines = collect_lines(by_rank[rank])
        for label in {name for _, name in lines} - {BASELINE}:
            gains = [
                mean(line.exact) - mean(lines[task, BASELINE].exact)
                for (task, name), line in lines.items()
                if name == label and (task, BASELINE) in lines
            ]
            if gains:
                above[label].append(f"{rank}: {100 * mean(gains):+.1f}")
    return {label: ", ".join(found) for label, found in above.items()}
