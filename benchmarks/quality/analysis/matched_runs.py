"""The stages "matched" and "sizes": starts that are told their rate, and rows of other sizes at every rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import Cells, best_rate, loss_of
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE, STANDARD_RANK

Key = tuple[str, float, int]
"""Task, learning rate, seed."""

WARMUP = Experiment.__dataclass_fields__["warmup"].default
"""Share of the steps, in the stage "grid"."""


def matched(label: str) -> str:
    """The label of a line that is told its rate."""
    return f"{label}(matched=True)"


def runs_of(
    records: Iterable[Record], stage: str, rank: int = STANDARD_RANK, warmup: float = WARMUP
) -> dict[str, dict[Key, Record]]:
    """By label, at one rank and under one schedule."""
    found: dict[str, dict[Key, Record]] = defaultdict(dict)
    for record in records:
        same = record["rank"] == rank and record["experiment"]["warmup"] == warmup
        if record["stage"] == stage and same:
            place = (record["task"], record["learning_rate"], record["seed"])
            found[record["label"]][place] = record
    return dict(found)


def gaps(
    mine: Mapping[Key, Record], other: Callable[[Key], Record | None], rate: float
) -> list[float]:
    """Test loss above the other run's, mean over the seeds that both have, by task."""
    found: dict[str, list[float]] = defaultdict(list)
    for key, record in sorted(mine.items()):
        beside = other(key)
        if key[1] == rate and beside is not None:
            found[key[0]].append(loss_of(record) - loss_of(beside))
    return [statistics.mean(values) for values in found.values()]


def at_best(plain: Mapping[Key, Record], cells: Cells) -> Callable[[Key], Record | None]:
    """For a run's key, plain LoRA's run of its seed at its best rate on the task."""
    best = {task: best_rate(lines[BASELINE]) for task, lines in cells.items() if BASELINE in lines}
    return lambda key: plain.get((key[0], best.get(key[0], -1.0), key[2]))


def by_rate(records: Sequence[Record], cells: Cells, label: str = "auto") -> str:
    """At every rate: a line told the rate, the line as it is and plain LoRA told it, beside plain LoRA there.

    Args:
        records: of one model.
        cells: of its grid, which say the best rate of plain LoRA on each task.
        label: of the line.
    """
    told, grid = runs_of(records, "matched"), runs_of(records, "grid")
    plain, tuned = grid[BASELINE], at_best(grid[BASELINE], cells)

    def lines(rate: float) -> list[str]:
        mine = Mean.of(gaps(told[matched(label)], plain.get, rate))
        as_it_is = {k: r for k, r in grid.get(label, {}).items() if k in told[matched(label)]}
        theirs = gaps(told.get(matched(BASELINE), {}), plain.get, rate)
        return [
            f"{rate:g}",
            str(mine),
            f"{mine.below} of {mine.tasks}",
            f"{statistics.mean(gaps(as_it_is, plain.get, rate)):+.3f}" if as_it_is else "",
            f"{statistics.mean(theirs):+.3f}" if theirs else "",
            f"{statistics.mean(gaps(told[matched(label)], tuned, rate)):+.3f}",
        ]

    rates = sorted({rate for _, rate, _ in told[matched(label)]})
    heads = [
        "learning rate", "Auto matched to it, beside plain LoRA at it, nats", "tasks below",
        "Auto as it is", "plain LoRA matched to it", "Auto matched, beside plain LoRA at its best rate",
    ]  # fmt: skip
    return table(heads, [lines(rate) for rate in rates])


def by_line(records: Sequence[Record], names: Mapping[str, str], rate: float) -> str:
    """Lines that are told a rate, beside plain LoRA there and beside plain LoRA told it; first seeds.

    A line without runs of both kinds is left out.

    Args:
        records: of one model.
        names: of the lines, by label.
        rate: that they were told.
    """
    told, grid = (
        {
            label: {key: run for key, run in runs.items() if key[2] == 0}
            for label, runs in runs_of(records, stage).items()
        }
        for stage in ("matched", "grid")
    )
    rows = []
    for label, name in names.items():
        mine, grid_runs = told.get(matched(label), {}), grid.get(label, {})
        as_it_is = {key: grid_runs[key] for key in mine if key in grid_runs}
        if not as_it_is:
            continue
        rows.append(
            [
                name,
                *(
                    str(Mean.of(gaps(runs, beside.get, rate)))
                    for runs, beside in (
                        (as_it_is, grid[BASELINE]),
                        (mine, grid[BASELINE]),
                        (mine, told[matched(BASELINE)]),
                    )
                ),
            ]
        )
    heads = [
        "line", "as it is, beside plain LoRA as it is", "told it, beside plain LoRA as it is",
        "told it, beside plain LoRA told it",
    ]  # fmt: skip
    return table(heads, rows)


def by_rank(records: Sequence[Record], label: str = "auto", warmup: float = 0.1) -> str:
    """One rate for all ranks: a line told it beside plain LoRA told it, and what its first step does."""
    rows = []
    for rank in sorted({r["rank"] for r in records if r["stage"] == "matched"}):
        told = runs_of(records, "matched", rank, warmup)
        if matched(label) not in told:
            continue
        mine, base = told[matched(label)], told[matched(BASELINE)]
        (rate,) = {rate for _, rate, _ in mine}
        pairs = [(mine[key], base[key]) for key in mine if key in base]
        beside = Mean.of(gaps(mine, base.get, rate))
        kept = sum(_first_step(a) <= 0 for a, _ in pairs)
        early = statistics.mean(_early(a) / _early(b) - 1 for a, b in pairs)
        rows.append(
            [
                f"{rank}",
                f"{statistics.mean(loss_of(a) for a, _ in pairs):.3f}",
                f"{statistics.mean(loss_of(b) for _, b in pairs):.3f}",
                str(beside),
                f"{beside.below} of {beside.tasks}",
                f"{kept} of {len(pairs)}",
                f"{100 * early:+.0f}%",
            ]
        )
    heads = [
        "rank", "Auto's test loss", "plain LoRA's", "difference, nats", "tasks below",
        "first step not above the start", "mean loss of the first tenth beside plain LoRA's",
    ]  # fmt: skip
    return table(heads, rows)


def by_warmup(records: Sequence[Record], labels: Mapping[str, str], warmup: float = 0.1) -> str:
    """A longer warmup beside the grid's: each line at its best rate of those that ran under both.

    Args:
        records: of one model.
        labels: of the lines, by what a row is called.
        warmup: share of the steps.
    """
    long, short = runs_of(records, "sizes", warmup=warmup), runs_of(records, "grid")
    rows = []
    for name, label in labels.items():
        ends, before, after, kept = [], [], [], []
        for task in sorted({key[0] for key in long[label]}):
            keys = [k for k in long[label] if k[0] == task and k in short[label]]
            a, b = (
                min((runs[label][k] for k in keys), key=lambda r: loss_of(r, "validation"))
                for runs in (long, short)
            )
            ends.append(loss_of(a) - loss_of(b))
            before.append(_early(b))
            after.append(_early(a))
            kept.append(_first_step(a) <= 0)
        rows.append(
            [
                name,
                str(Mean.of(ends)),
                f"{statistics.mean(before):.2f}, {statistics.mean(after):.2f}",
                f"{sum(kept)} of {len(kept)}",
            ]
        )
    heads = [
        "line", "test loss under the longer warmup above that under the shorter, nats",
        "mean loss of the first tenth: shorter, longer", "first step not above the start, longer",
    ]  # fmt: skip
    return table(heads, rows)


def _first_step(record: Record) -> float:
    """Held-out loss after the first step above that of the start."""
    held = dict(zip(record["heldout"]["steps"], record["heldout"]["loss"], strict=True))
    return float(held[1] - held[0])


def _early(record: Record) -> float:
    """Mean held-out loss over the measured steps of the first tenth."""
    last = record["experiment"]["steps"] / 10
    held = zip(record["heldout"]["steps"], record["heldout"]["loss"], strict=True)
    return statistics.mean(loss for step, loss in held if step <= last)


def by_size(
    records: Sequence[Record], cells: Cells, lines: Mapping[str, Mapping[float, str]]
) -> str:
    """Rows so many times as long, at every rate: test loss above plain LoRA's at its best rate.

    Args:
        records: of one model.
        cells: of its grid.
        lines: by what a row is called, labels by the size of rows.
    """
    sized, grid = runs_of(records, "sizes"), runs_of(records, "grid")
    tuned = at_best(grid[BASELINE], cells)
    tasks = {key[0] for runs in sized.values() for key in runs} & cells.keys()
    rates = sorted({key[1] for runs in sized.values() for key in runs})

    rows = []
    for name, labels in lines.items():
        for size, label in labels.items():
            runs = sized.get(label, {}) | grid.get(label, {})
            first = {k: r for k, r in runs.items() if k[0] in tasks and k[2] == 0}
            found = [gaps(first, tuned, rate) for rate in rates]
            means = [f"{statistics.mean(v):+.3f}" if len(v) == len(tasks) else "" for v in found]
            if any(means):
                rows.append([name, f"{size:g}", *means])
    return table(["start", "rows times", *(f"{rate:g}" for rate in rates)], rows)
