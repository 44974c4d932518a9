"""The stage "suggested": a line beside plain LoRA, each at the rate that was suggested for it, by rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from scipy import stats

from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import loss_of
from benchmarks.quality.analysis.t_tests import Mean, holm, task_level_p
from benchmarks.quality.records import Record
from benchmarks.quality.stages import BASELINE

Runs = dict[int, Record]
"""By seed."""


def runs_by_rank(records: Iterable[Record]) -> dict[int, dict[str, dict[str, Runs]]]:
    """By rank, task, label and seed."""
    found: dict[int, dict[str, dict[str, Runs]]] = {}
    for record in records:
        if record["stage"] == "suggested":
            lines = found.setdefault(record["rank"], {}).setdefault(record["task"], {})
            lines.setdefault(record["label"], {})[record["seed"]] = record
    return dict(sorted(found.items()))


def paired(mine: Runs, base: Runs) -> tuple[list[Record], list[Record]]:
    """Runs of the seeds that both have."""
    seeds = sorted(mine.keys() & base.keys())
    return [mine[s] for s in seeds], [base[s] for s in seeds]


def suggested_table(records: Iterable[Record], label: str = "auto") -> str:
    """Test loss and points beside plain LoRA's at the same rank, and tasks that are worse beyond chance."""
    rows = []
    for rank, tasks in runs_by_rank(records).items():
        pairs = {
            task: paired(lines[label], lines[BASELINE])
            for task, lines in tasks.items()
            if label in lines and BASELINE in lines
        }
        pairs = {task: (mine, base) for task, (mine, base) in pairs.items() if mine}
        gaps, points, ps = [], [], {}
        for task, (mine, base) in pairs.items():
            a, b = ([loss_of(r) for r in side] for side in (mine, base))
            gaps.append(statistics.mean(a) - statistics.mean(b))
            exact = [statistics.mean(r["test"]["exact"] for r in side) for side in (mine, base)]
            points.append(100 * (exact[0] - exact[1]))
            ps[task] = float(stats.ttest_ind(a, b, equal_var=False).pvalue)
        known = holm({task: p for task, p in ps.items() if not math.isnan(p)})
        worse = sum(known.get(t, 1.0) < 0.05 and g > 0 for t, g in zip(pairs, gaps, strict=True))
        loss = Mean.of(gaps)
        rates = [
            math.exp(
                statistics.mean(math.log(pair[side][0]["learning_rate"]) for pair in pairs.values())
            )
            for side in (0, 1)
        ]
        rows.append(
            [
                f"{rank}",
                f"{loss.tasks} x {min(len(mine) for mine, _ in pairs.values())}",
                str(loss),
                Mean.of(points).rounded(1),
                f"{loss.below}",
                f"{worse}",
                f"{task_level_p(gaps):.2g}",
                f"{rates[0]:.1e}, {rates[1]:.1e}",
            ]
        )
    heads = [
        "rank", "tasks x least seeds", "test loss beside plain LoRA's, nats", "exact match, points",
        "tasks below", "tasks above beyond chance (Holm)", "p over tasks",
        "suggested rates, geometric means: line, plain LoRA",
    ]  # fmt: skip
    return table(heads, rows)
