"""What the two papers claim of their starts, asked of the records; and what was forgotten.

A claim holds where the 95% interval of its paired difference to plain LoRA lies on its side of zero,
fails where it lies on the other, and is open otherwise: few runs cannot make a claim hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.quality.analyze import (
    Line,
    bootstrap,
    collect_lines,
    finite,
    good_ranges,
    mean,
    number,
    ordered,
    paired,
    stratified,
    table,
)
from benchmarks.quality.experiment import FULL
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

Lines = Mapping[tuple[str, str], Line]


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


def rises(lines: Lines, records: Iterable[Record]) -> dict[tuple[str, str], list[float]]:
    """By task and method, over seeds: what fine-tuning adds to the loss on another task, from the base's."""
    chosen: dict[tuple[str, str], list[Record]] = defaultdict(list)
    base: dict[tuple[str, int], float] = {}
    for record in records:
        if "other" not in record:
            continue
        if record["label"] == BASELINE:
            base[record["task"], record["seed"]] = finite(record["other"]["start_loss"])
        line = lines.get((record["task"], record["label"]))
        if line is not None and record["learning_rate"] == line.rate:
            chosen[record["task"], record["label"]].append(record)
    return {
        (task, label): [
            finite(r["other"]["loss"]) - base[task, r["seed"]]
            for r in mine
            if (task, r["seed"]) in base
        ]
        for (task, label), mine in chosen.items()
    }


def forgetting_table(lines: Lines, records: Iterable[Record]) -> str:
    """Rise of the loss on another task, from the base's to that after fine-tuning."""
    found = rises(lines, records)
    tasks = sorted({task for task, _ in found})
    rows = [
        [label, *(f"{mean(v):+.2f}" if (v := found.get((task, label))) else "–" for task in tasks)]
        for label in ordered({label for _, label in found})
    ]
    return table(["method", *tasks], rows)


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


def aims_table(lines: Lines, search: Iterable[Record] = (), few_shot: Iterable[Record] = ()) -> str:
    """Every method against the best of all others, plain LoRA among them.

    A method with other settings is not another method, nor are Natural and Auto (`family`); full
    fine-tuning is the upper line, no start of an adapter.

    Steps to plain LoRA's final loss (median over runs) and early loss above it (mean) as a share of the
    best other's; tasks on which the score is above and significantly below the best other's (of that
    task, by its mean); the good range of learning rates beside plain LoRA's; tasks on which few-shot
    training scores above every other.
    """
    lines = {key: line for key, line in lines.items() if key[1] != FULL}
    labels = ordered({label for _, label in lines})
    share = {label: _median_share(lines, label) for label in labels}
    early = {
        label: mean([mean(x.early) for (_, n), x in lines.items() if n == label])
        for label in labels
    }
    width = good_ranges(search)
    few = collect_lines(few_shot)
    rows = []
    for label in labels:
        others = [name for name in labels if family(name) != family(label)]
        if not others:
            continue
        above, below, seen = against_best(lines, label)
        rows.append(
            [
                label,
                _ratio(share[label], min(share[name] for name in others)),
                _ratio(early[label], min(early[name] for name in others)),
                f"{above} above, {below} significantly below, of {seen}",
                f"{number(width.get(label, math.nan), 2)} / {number(width.get(BASELINE, math.nan), 2)}",
                _few_shot(few, label),
            ]
        )
    header = [
        "method", "steps to LoRA's final loss, % of the best other's",
        "early loss above it, % of the best other's", "tasks, against the best other",
        "good range of learning rates, decades / LoRA's", "few-shot: tasks above every other",
    ]  # fmt: skip
    return table(header, rows)


def against_best(lines: Lines, label: str) -> tuple[int, int, int]:
    """Tasks on which a method is above the best other one of that task, significantly below it, and all."""
    above = below = seen = 0
    for task in sorted({t for t, name in lines if name == label}):
        peers = [
            x
            for (t, n), x in lines.items()
            if t == task and n != FULL and family(n) != family(label)
        ]
        if not peers:
            continue
        seen += 1
        differences = paired(
            lines[task, label], max(peers, key=lambda line: (mean(line.exact), line.label))
        )
        above += mean(differences) > 0
        below += bootstrap(differences)[1] < 0
    return above, below, seen


def family(label: str) -> str:
    """The method of a line, whatever its settings; Auto is Natural or plain LoRA."""
    name = label.split("(")[0]
    return "natural" if name == "auto" else name


def _median_share(lines: Lines, label: str) -> float:
    shares = [
        to / line.heldout[i][0][-1]
        for (_, name), line in lines.items()
        if name == label
        for i, to in enumerate(line.steps_to)
    ]
    return float(np.median(shares)) if shares else math.nan


def _ratio(mine: float, best: float) -> str:
    """In percent; a start below plain LoRA's final loss has no sensible ratio and says so."""
    if not (math.isfinite(mine) and math.isfinite(best)):
        return "never" if math.isinf(mine) else "–"
    if best <= 0:
        return "the best other is at or below it"
    return f"{100 * mine / best:.0f}%"


def _few_shot(lines: Lines, label: str) -> str:
    tasks = sorted({task for task, name in lines if name == label})
    wins = sum(
        mean(lines[task, label].exact)
        > max(
            (
                mean(x.exact)
                for (t, n), x in lines.items()
                if t == task and family(n) != family(label)
            ),
            default=1.0,
        )
        for task in tasks
    )
    return f"{wins} of {len(tasks)}" if tasks else "–"
