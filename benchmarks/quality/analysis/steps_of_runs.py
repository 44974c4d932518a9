"""What the first steps of the recorded runs themselves tell of the best rate, on every model.

A suggestion from the peak rate whose held-out loss after so many steps of training, under the stage's own
warmup, is least of the rates that ran: what measuring the same before training can come to.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.suggested_rates import cases, quantiles
from benchmarks.quality.records import Record

STEPS = (2, 3, 6, 13)


def steps_of_runs(grid: Iterable[Record], law: Callable[[float], float]) -> str:
    """Regret of the law after so many steps of training, by model: median / nine in ten below, in percent."""
    records = [r for r in grid if "+" not in r["experiment"]["model"]]
    found = {steps: cases(records, after(records, steps)) for steps in STEPS}
    rows = []
    for model in sorted({case.model for members in found.values() for case in members}):
        cells = []
        for members in found.values():
            mine = [case.regret(law(case.two_steps)) for case in members if case.model == model]
            median, decile, _ = quantiles(mine)
            cells.append(f"{100 * median:.1f} / {100 * decile:.1f}")
        lines = sum(case.model == model for case in found[STEPS[0]])
        rows.append([model, f"{lines}", *cells])
    return table(["model", "lines", *(f"after {steps} steps" for steps in STEPS)], rows)


def after(records: Sequence[Record], steps: int) -> list[Record]:
    """For every line a record as `cases` reads suggestions, its rate from the runs' held-out losses."""
    losses: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    first: dict[Any, Record] = {}
    for record in records:
        key = (record["experiment"]["model"], record["task"], record["label"], record["rank"])
        curve = dict(zip(record["heldout"]["steps"], record["heldout"]["loss"], strict=True))
        if steps in curve:
            loss = math.inf if curve[steps] is None else curve[steps]
            losses[key][record["learning_rate"]].append(loss)
            first.setdefault(key, record)
    return [
        first[key] | {"suggestion": {"two_steps": minimum(by_rate)}}
        for key, by_rate in losses.items()
    ]


def minimum(by_rate: dict[float, list[float]]) -> float:
    """The rate of least mean loss, by a parabola in its logarithm through the lowest and its neighbours."""
    rates = sorted(by_rate)
    losses = [statistics.fmean(by_rate[rate]) for rate in rates]
    at = min(range(len(rates)), key=losses.__getitem__)
    if not (0 < at < len(rates) - 1 and all(map(math.isfinite, losses[at - 1 : at + 2]))):
        return rates[at]
    x0, x1, x2 = (math.log(rate) for rate in rates[at - 1 : at + 2])
    y0, y1, y2 = losses[at - 1 : at + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if not right > left:
        return rates[at]
    lowest = (x0 + x1) / 2 - left * (x2 - x0) / (2 * (right - left))
    return math.exp(min(max(lowest, x0), x2))
