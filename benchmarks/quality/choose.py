"""Which tasks the benchmark compares on, chosen by plain LoRA's records alone.

    python -m benchmarks.quality.choose FOLDER --most 12

Of each task: the loss of the base, and plain LoRA's test loss and exact match at its best rate of the grid by
validation loss. A task has room if that exact match is above a floor and below a ceiling, and if its best rate
is inside the grid. Those with the least seed noise are taken: the deviation of the test loss between seeds, as
a share of what plain LoRA takes off the base's loss. No other method's record is read.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.records import Record, read_records

FLOOR, CEILING = 0.05, 0.95

CHOSEN_ON = "smollm2-135m-instruct"

CHOSEN = (
    "basic_arithmetic",
    "calendar_arithmetic",
    "chain_sum",
    "complex_arithmetic",
    "count_bits",
    "gcd",
    "isomorphic_strings",
    "ransom_note",
    "time_intervals",
    "word_sorting",
)
"""The ten of nineteen tasks that were taken, before most other lines had run. The choice stays what it was:
tasks that run later are fresh, and other language models are compared on these, too."""


@dataclass(frozen=True)
class Room:
    """What plain LoRA makes of a task.

    Attributes:
        task: its name.
        base: held-out loss of the base.
        loss: test loss at the best rate, mean over seeds.
        exact: exact match there.
        deviation: of the test loss between seeds.
        rate: the best.
        inside: whether the best rate has a neighbour on both sides.
    """

    task: str
    base: float
    loss: float
    exact: float
    deviation: float
    rate: float
    inside: bool

    @property
    def noise(self) -> float:
        """The deviation as a share of the fall of the loss."""
        return self.deviation / max(self.base - self.loss, 1e-9)

    @property
    def has_room(self) -> bool:
        return FLOOR <= self.exact <= CEILING and self.inside and self.base > self.loss


def rooms(records: Iterable[Record]) -> list[Room]:
    """Of every task with two seeds of plain LoRA in the stage "grid", least noise first.

    Seeds that have not run at every rate of the task have no say.
    """
    runs: dict[str, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["label"] == "vanilla" and record["stage"] == "grid":
            runs[record["task"]][record["learning_rate"]].append(record)
    found = []
    for task, every in runs.items():
        whole = set.intersection(*({r["seed"] for r in members} for members in every.values()))
        if len(whole) < 2:
            continue
        rates = {
            rate: [r for r in members if r["seed"] in whole] for rate, members in every.items()
        }
        mean = {
            rate: statistics.mean(float(r["validation"]["loss"] or 1e9) for r in members)
            for rate, members in rates.items()
        }
        best = min(mean, key=lambda rate: mean[rate])
        members = rates[best]
        losses = [float(r["test"]["loss"]) for r in members]
        found.append(
            Room(
                task,
                statistics.mean(float(r["heldout_at_percent"]["0"]) for r in members),
                statistics.mean(losses),
                statistics.mean(float(r["test"]["exact"]) for r in members),
                statistics.stdev(losses),
                best,
                min(rates) < best < max(rates),
            )
        )
    return sorted(found, key=lambda room: room.noise)


def chosen(found: Iterable[Room], most: int) -> list[str]:
    return [room.task for room in found if room.has_room][:most]


def table(found: Iterable[Room], names: Iterable[str]) -> str:
    taken = set(names)
    lines = [
        "| task | base loss | plain LoRA: test loss | exact match | best rate | seed deviation / fall | |",
        "|---|---|---|---|---|---|---|",
    ]
    for room in found:
        why = "taken" if room.task in taken else ("noisier" if room.has_room else "no room")
        lines.append(
            f"| {room.task} | {room.base:.3f} | {room.loss:.4f} | {room.exact:.1%} | {room.rate:g} "
            f"| {room.noise:.2%} | {why} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", default=CHOSEN_ON)
    parser.add_argument("--most", type=int, default=12)
    parser.add_argument("--names", action="store_true", help="names alone, for a shell")
    arguments = parser.parse_args()
    records = read_records(arguments.folders).values()
    found = rooms(r for r in records if r["experiment"]["model"] == arguments.model)
    names = chosen(found, arguments.most)
    print(" ".join(names) if arguments.names else table(found, names))


if __name__ == "__main__":
    main()
