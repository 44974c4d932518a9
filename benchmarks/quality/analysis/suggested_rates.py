"""The suggested learning rate against the rates of the stage "grid": what is lost by not searching.

Regret of a rate: validation loss there above that of the best rate, as a share of what training gains at all,
``(loss - best) / (base - best)``; between two rates of the grid the loss is read off a straight line in the
logarithm of the rate, beyond its ends at them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.analysis.markdown import table as markdown_table
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

RANGE = 1.8
"""From the suggestion to the ends of its range."""

Key = tuple[str, str, int]
"""Task, line and rank."""


@dataclass(frozen=True)
class Case:
    """One line on one task, with its losses over the grid and what is known before training.

    Attributes:
        key: task, line, rank.
        base: validation loss without an adapter, before any step of plain LoRA's runs.
        losses: mean validation loss over seeds, by rate.
        two_steps: peak rate whose first two steps are best.
        model: its name.
    """

    key: Key
    base: float
    losses: Mapping[float, float]
    two_steps: float
    model: str = ""

    def loss_at(self, rate: float) -> float:
        rates = sorted(self.losses)
        rate = min(max(rate, rates[0]), rates[-1])
        after = next(i for i, r in enumerate(rates) if r >= rate * (1 - 1e-9))
        before = max(after - 1, 0)
        width = math.log(rates[after] / rates[before])
        share = math.log(rate / rates[before]) / width if width else 0.0
        return (1 - share) * self.losses[rates[before]] + share * self.losses[rates[after]]

    def regret(self, rate: float) -> float:
        best = min(self.losses.values())
        return (self.loss_at(rate) - best) / (self.base - best)


def _key(record: Record) -> Key:
    return (record["task"], record["label"], record["rank"])


def cases(grid: Iterable[Record], suggestions: Iterable[Record], rates: int = 6) -> list[Case]:
    """Every line with a grid of at least so many rates and a suggestion."""
    losses: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    bases: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in grid:
        loss, model = record["validation"]["loss"], record["experiment"]["model"]
        place = losses[model, *_key(record)]
        place[record["learning_rate"]].append(math.inf if loss is None else loss)
        if record["label"] == BASELINE:
            bases[model, record["task"]].append(record["heldout"]["loss"][0])
    found = []
    for record in suggestions:
        model = record["experiment"]["model"]
        mine = {r: statistics.fmean(v) for r, v in losses[model, *_key(record)].items()}
        if "suggestion" in record and len(mine) >= rates:
            base = statistics.fmean(bases[model, record["task"]])
            best = record["suggestion"]["two_steps"]
            found.append(Case(_key(record), base, mine, best, model))
    return sorted(found, key=lambda case: (case.model, case.key))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, ninth decile (linear between neighbours) and largest."""
    ordered = sorted(values)
    place = 0.9 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    decile = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return statistics.median(ordered), decile, ordered[-1]


def interval(members: Sequence[Case], law: Callable[[float], float]) -> str:
    """Of the median and of the ninth decile of regret, in percent: 95% by a bootstrap over tasks."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for m in members:
        by_task[m.key[0]].append(m.regret(law(m.two_steps)))
    generator, tasks = random.Random(0), list(by_task.values())
    drawn = [
        quantiles([r for task in generator.choices(tasks, k=len(tasks)) for r in task])[:2]
        for _ in range(2000)
    ]
    ends = []
    for values in zip(*drawn, strict=True):
        ordered = sorted(100 * v for v in values)
        ends.append(f"[{ordered[50]:.1f}, {ordered[-51]:.1f}]")
    return " / ".join(ends)


def fit(members: Sequence[Case]) -> tuple[float, float]:
    """The law ``c (two_steps / 5e-4)^p`` of least ninth decile plus three medians of regret, on a grid."""

    def badness(c: float, p: float) -> float:
        median, decile, _ = quantiles([m.regret(c * (m.two_steps / 5e-4) ** p) for m in members])
        return decile + 3 * median

    constants = [1e-4 * 10 ** (i / 20) for i in range(10, 31)]
    powers = [i / 20 for i in range(0, 25)]
    return min(((c, p) for c in constants for p in powers), key=lambda law: badness(*law))


def table(members: Sequence[Case], law: Callable[[float], float]) -> str:
    """Regret of the suggestion, of laws fitted without the task that they are judged on, of single rates."""
    tasks = sorted({m.key[0] for m in members})
    left_out: list[float] = []
    for task in tasks:
        c, p = fit([m for m in members if m.key[0] != task])
        mine = [m for m in members if m.key[0] == task]
        left_out += [m.regret(c * (m.two_steps / 5e-4) ** p) for m in mine]
    rows = [
        ("suggested", [m.regret(law(m.two_steps)) for m in members]),
        *(
            (f"suggested, {name}", [m.regret(law(m.two_steps) * factor) for m in members])
            for name, factor in (("lower end", 1 / RANGE), ("upper end", RANGE))
        ),
        ("law fitted without the task", left_out),
        *(
            (f"{rate:g} for all", [m.regret(rate) for m in members])
            for rate in (1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3)
        ),
    ]
    best = min((1e-4 * 10 ** (i / 20) for i in range(41)), key=lambda r: _spread(members, r))
    rows.append((f"{best:.2g}, the best single rate", [m.regret(best) for m in members]))
    cells = [[name, *(f"{100 * x:.1f}%" for x in quantiles(values))] for name, values in rows]
    return markdown_table(["rate", "regret: median", "nine in ten below", "largest"], cells)


def _spread(members: Sequence[Case], rate: float) -> float:
    median, decile, _ = quantiles([m.regret(rate) for m in members])
    return decile + 3 * median


def by_line(members: Sequence[Case], law: Callable[[float], float]) -> str:
    """Suggested and best rates of every line, and the regret."""
    groups: dict[tuple[str, int], list[Case]] = defaultdict(list)
    for m in members:
        groups[m.key[1], m.key[2]].append(m)
    rows = []
    for (line, rank), mine in sorted(groups.items()):
        regrets = [m.regret(law(m.two_steps)) for m in mine]
        middle = statistics.geometric_mean
        rows.append(
            [
                line,
                str(rank),
                str(len(mine)),
                f"{middle([m.two_steps for m in mine]):.1e}",
                f"{middle([law(m.two_steps) for m in mine]):.1e}",
                f"{middle([min(m.losses, key=m.losses.__getitem__) for m in mine]):.1e}",
                f"{100 * statistics.median(regrets):.1f}%",
                f"{100 * max(regrets):.1f}%",
            ]
        )
    head = [
        "line",
        "rank",
        "tasks",
        "two steps",
        "suggested",
        "best of the grid",
        "median regret",
        "largest",
    ]
    return markdown_table(head, rows)


def by_model(members: Sequence[Case], law: Callable[[float], float]) -> str:
    """Each model's regret: median and ninth decile, of the suggestion and of single rates.

    Of a language model also that of a law fitted on the other ones alone.
    """
    rates = (1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3, 4.6e-3)
    rows = []
    for model in sorted({m.model for m in members}):
        mine = [m for m in members if m.model == model]
        others = [m for m in members if m.model != model and _has_no_head(m.model)]
        shown: list[list[float] | None] = [[m.regret(law(m.two_steps)) for m in mine], None]
        if others and _has_no_head(model):
            c, p = fit(others)
            shown[1] = [m.regret(c * (m.two_steps / 5e-4) ** p) for m in mine]
        shown += [[m.regret(rate) for m in mine] for rate in rates]
        cells = list(map(_median_and_decile, shown))
        rows.append([model, str(len(mine)), cells[0], interval(mine, law), *cells[1:]])
    heads = [
        "model",
        "lines",
        "suggested",
        "95% over tasks",
        "law of the other model",
        *(f"{r:g} for all" for r in rates),
    ]
    return markdown_table(heads, rows)


def _median_and_decile(regrets: Sequence[float] | None) -> str:
    if regrets is None:
        return "–"
    median, decile, _ = quantiles(regrets)
    return f"{100 * median:.1f} / {100 * decile:.1f}"


def _has_no_head(model: str) -> bool:
    return kind_of(model).head is None
