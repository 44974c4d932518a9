"""The stage "steps": lines beside plain LoRA in runs of other lengths, and the cost of a suggested rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.quality.analysis.grid_comparison import compared
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import cells_of
from benchmarks.quality.analysis.rate_tables import gaps_at
from benchmarks.quality.analysis.suggested_rates import cases, quantiles
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.records import Record
from benchmarks.quality.stages import STANDARD_RANK

SAME = (1e-4, 1e-3)
"""Rates at which lines stand beside plain LoRA at the same."""

WARMUP = {"grid": Experiment.__dataclass_fields__["warmup"].default, "steps": 0.1}
"""Share of the steps, by stage; runs under another schedule are left out."""

Lengths = Mapping[int, Sequence[Record]]
"""By number of steps."""


def by_length(records: Iterable[Record]) -> Lengths:
    """Runs of every length at the standard rank, as if all were of the stage "grid", whose length is one."""
    found: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        experiment = record["experiment"]
        scheduled = experiment["warmup"] == WARMUP.get(record["stage"])
        if scheduled and record["rank"] == STANDARD_RANK:
            found[experiment["steps"]].append(record | {"stage": "grid"})
    return dict(sorted(found.items()))


def length_table(lengths: Lengths, names: Mapping[str, str]) -> str:
    """Test loss beside plain LoRA's, each at its own best rate, and both at fixed ones.

    Args:
        lengths: runs of one model.
        names: of the lines, by label; others are left out.
    """
    rows = []
    for steps, records in lengths.items():
        cells = cells_of(records)
        found = {label: tasks for label, tasks, *_ in compared(cells)}
        for label, name in names.items():
            if label in found:
                loss = Mean.of([d.loss for d in found[label]])
                rows.append(
                    [
                        f"{steps}",
                        name,
                        f"{loss.tasks} x {min(d.seeds for d in found[label])}",
                        str(loss),
                        Mean.of([d.exact for d in found[label]]).rounded(1),
                        f"{loss.below}",
                        *(str(Mean.of(gaps_at(cells, label, rate))) for rate in SAME),
                    ]
                )
    heads = [
        "steps", "line", "tasks x least seeds", "test loss beside plain LoRA's, each tuned, nats",
        "exact match, points", "tasks below", *(f"both at {rate:g}" for rate in SAME),
    ]  # fmt: skip
    return table(heads, rows)


def regret_table(
    lengths: Lengths,
    suggestions: Sequence[Record],
    names: Mapping[str, str],
    law: Callable[[float], float],
) -> str:
    """What is lost at the suggested rate, whose law was fitted at one number of steps.

    Args:
        lengths: runs of one model.
        suggestions: of its lines.
        names: of the lines, by label.
        law: from the rate of two steps to that of a run.
    """
    rows = []
    for steps, records in lengths.items():
        known = cases(records, suggestions)
        for label, name in names.items():
            mine = [case for case in known if case.key[1] == label]
            if not mine:
                continue
            regrets = quantiles([case.regret(law(case.two_steps)) for case in mine])
            told = [law(case.two_steps) for case in mine]
            best = [min(case.losses, key=case.losses.__getitem__) for case in mine]
            rows.append(
                [
                    f"{steps}",
                    name,
                    f"{len(mine)}",
                    *(f"{100 * value:.1f}%" for value in regrets),
                    *(f"{statistics.geometric_mean(rates):.1e}" for rates in (told, best)),
                ]
            )
    heads = [
        "steps", "line", "tasks", "regret: median", "nine in ten below", "largest",
        "suggested, geometric mean", "best of the grid",
    ]  # fmt: skip
    return table(heads, rows)
