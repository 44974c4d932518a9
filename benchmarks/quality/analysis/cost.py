"""What a start costs, and when it has paid: steps and seconds to plain LoRA's final held-out loss.

Each line is at its best rate, and is asked for the first step at which its held-out loss is at or below plain
LoRA's last one, on the same seed; between two measured steps a curve is a straight line. Seconds are of a step
of one adapter alone (``benchmarks.quality.step_time``): those in the records are shares of a stack. A start's
seconds are those of a start alone where they were measured, else the median of the records, in which methods
share statistics of the union of their needs, so that these are rather too many; they are marked by a star.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.analysis.curves import crossing
from benchmarks.quality.analysis.lines import finite
from benchmarks.quality.analysis.markdown import number, table
from benchmarks.quality.analysis.rate_grid import Cells, Pair, labels_of, pairs
from benchmarks.quality.records import RESULTS, Record
from benchmarks.quality.stages import BASELINE

STEP_SECONDS = RESULTS / "step_seconds.jsonl"


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one model on one device, measured alone.

    Attributes:
        steps: of a training step, by task.
        starts: of a start, by label and task.
        device: that they were measured on; empty where nothing was.
    """

    steps: dict[str, float] = field(default_factory=dict)
    starts: dict[tuple[str, str], float] = field(default_factory=dict)
    device: str = ""

    @classmethod
    def of(cls, lines: Iterable[Record], model: str) -> StepTimes:
        """Of several lines that say the same, the median; of several devices, the one of the quickest step."""
        mine = [line for line in lines if line["model"] == model]
        timed = [line for line in mine if "step_seconds" in line]
        if not timed:
            return cls()
        device = min(timed, key=lambda line: line["step_seconds"])["device"]
        steps, starts = defaultdict(list), defaultdict(list)
        for line in (line for line in mine if line["device"] == device):
            if "step_seconds" in line:
                steps[line["task"]].append(line["step_seconds"])
            else:
                starts[line["label"], line["task"]].append(line["start_seconds"])
        return cls(
            {key: statistics.median(v) for key, v in steps.items()},
            {key: statistics.median(v) for key, v in starts.items()},
            device,
        )

    def start(self, label: str, task: str) -> float | None:
        """Of a start alone: on this task, else the median of other tasks; None where none was measured."""
        if (label, task) in self.starts:
            return self.starts[label, task]
        known = [seconds for (name, _), seconds in self.starts.items() if name == label]
        return statistics.median(known) if known else None


def read_step_times(path: Path = STEP_SECONDS) -> list[dict[str, Any]]:
    """Lines of the file, if there is one."""
    return (
        [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def shares(runs: Sequence[Record], base: Sequence[Record]) -> list[float]:
    """By seed: first step with a held-out loss at or below plain LoRA's last, as a share of its steps."""
    found = []
    for mine, plain in zip(runs, base, strict=True):
        curve, target = mine["heldout"], finite(plain["heldout"]["loss"][-1])
        to = crossing(curve["steps"], [finite(v) for v in curve["loss"]], target)
        found.append(to / plain["heldout"]["steps"][-1])
    return found


@dataclass(frozen=True)
class Cost:
    """A line on one task.

    Attributes:
        shares: by seed, see `shares`; infinite where the loss is never reached.
        start: seconds of the line's start beyond plain LoRA's.
        start_alone: whether both starts were measured alone.
        step: seconds of a step alone; NaN: not measured.
        steps: of plain LoRA's runs.
    """

    shares: list[float]
    start: float
    start_alone: bool
    step: float
    steps: int

    @property
    def share(self) -> float:
        return statistics.median(self.shares)

    @property
    def plain_seconds(self) -> float:
        return self.steps * self.step

    @property
    def seconds(self) -> float:
        """To plain LoRA's final held-out loss, with what the start takes beyond plain LoRA's."""
        return self.start + self.share * self.plain_seconds

    @property
    def pays_from(self) -> float:
        """Steps of training from which on the start has paid, if it always saves the same share of them."""
        if math.isnan(self.step):
            return math.nan
        if self.share >= 1:
            return math.inf
        return max(0.0, self.start / ((1 - self.share) * self.step))


def cost_of(found: Pair, times: StepTimes, label: str) -> Cost:
    starts = [times.start(name, found.task) for name in (label, BASELINE)]
    alone = all(seconds is not None for seconds in starts)
    if alone:
        mine, base = (float(seconds or 0.0) for seconds in starts)
    else:
        mine, base = (
            statistics.median(r["init_seconds"] for r in runs) for runs in (found.mine, found.base)
        )
    return Cost(
        shares(found.mine, found.base),
        mine - base,
        alone,
        times.steps.get(found.task, math.nan),
        int(found.base[0]["heldout"]["steps"][-1]),
    )


def cost_table(cells: Cells, times: StepTimes) -> str:
    """Every line, medians over tasks; below it, when plain LoRA is first at its own last loss."""
    rows, plain = [], {}
    for label in labels_of(cells):
        for found in pairs(cells, label):
            own = shares(found.base, found.base)
            plain |= {r["id"]: share for r, share in zip(found.base, own, strict=True)}
    for label in labels_of(cells):
        costs = [cost_of(found, times, label) for found in pairs(cells, label)]
        if not costs:
            continue
        runs = [share for cost in costs for share in cost.shares]
        # Starts of the records may be another device's.
        timed = [cost for cost in costs if cost.start_alone and not math.isnan(cost.step)]
        middle = statistics.median
        share = middle(cost.share for cost in costs)
        rows.append(
            (
                share,
                [
                    label,
                    f"{len(costs)}",
                    f"{sum(map(math.isfinite, runs))} of {len(runs)}",
                    "never" if math.isinf(share) else f"{100 * share:.0f}%",
                    f"{middle(c.start for c in costs):.2f}{'' if all(c.start_alone for c in costs) else '*'}",
                    f"{len(timed)}",
                    number(middle(c.seconds for c in timed), 2) if timed else "–",
                    number(middle(c.plain_seconds for c in timed), 2) if timed else "–",
                    number(middle(c.pays_from for c in timed), 0) if timed else "–",
                ],
            )
        )
    heads = [
        "line, at its best rate", "tasks", "runs that reach plain LoRA's final held-out loss",
        "steps to it, % of plain LoRA's", "start beyond plain LoRA's, s", "tasks timed",
        "seconds to it, start included", "plain LoRA's seconds", "steps from which the start has paid",
    ]  # fmt: skip
    if not rows:
        return ""
    own = (
        "Plain LoRA itself is first at or below its own last held-out loss after "
        f"{100 * statistics.median(plain.values()):.0f}% of its steps (median over runs)."
    )
    return table(heads, [row for _, row in sorted(rows, key=lambda r: r[0])]) + "\n\n" + own
