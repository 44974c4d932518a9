"""All tables of the stage "grid" for one model, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.quality.analysis.cost import StepTimes, cost_table
from benchmarks.quality.analysis.grid_comparison import by_task, comparison
from benchmarks.quality.analysis.grid_forgetting import grid_forgetting_table
from benchmarks.quality.analysis.rank_tables import rank_tables
from benchmarks.quality.analysis.rate_grid import BASELINE, Cells, cells_of
from benchmarks.quality.analysis.rate_tables import (
    claims_at_rates,
    common_tasks,
    rate_table,
    task_table,
)
from benchmarks.quality.choose import CHOSEN, CHOSEN_ON, rooms, table
from benchmarks.quality.experiment import GRID
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.records import Record
from benchmarks.quality.stages import STANDARD_RANK

PAIRED = (
    "A line and plain LoRA are compared on the seeds that both have run, at the rates that all these seeds "
    "have run in both (later seeds have six, 1e-4 to 4.6e-3); each takes the rate of least validation loss. "
    "Intervals are 95%, by t over tasks. The last column counts tasks on which the line's best rate is the "
    "lowest or the highest of those compared, where it may be better outside."
)


@dataclass(frozen=True)
class ModelGrid:
    """The runs of one model.

    Attributes:
        model: its name in an experiment.
        records: of the stage "grid", all ranks.
    """

    model: str
    records: Sequence[Record]

    @property
    def score(self) -> str:
        """What the share of right answers is called: classifiers have an accuracy."""
        return "exact match" if kind_of(self.model).head is None else "accuracy"

    @property
    def standard(self) -> list[Record]:
        return [r for r in self.records if r["rank"] == STANDARD_RANK]

    def is_compared_on(self, task: str) -> bool:
        """Language models are compared on the chosen tasks, classifiers on all of theirs."""
        return task in CHOSEN or kind_of(self.model).head is not None

    @property
    def main(self) -> list[Record]:
        """At the standard rank, on the tasks that are compared on."""
        return [r for r in self.standard if self.is_compared_on(r["task"])]

    @property
    def fresh(self) -> list[Record]:
        """At the standard rank, on all other tasks on which more than plain LoRA has run."""
        tasks = {r["task"] for r in self.standard if r["label"] != BASELINE}
        rest = [r for r in self.standard if not self.is_compared_on(r["task"])]
        return [r for r in rest if r["task"] in tasks]


def by_grid_model(records: Iterable[Record]) -> list[ModelGrid]:
    """Every model of the stage "grid"."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["stage"] == "grid":
            found.setdefault(record["experiment"]["model"], []).append(record)
    return [ModelGrid(model, mine) for model, mine in sorted(found.items())]


def grid_report(grid: ModelGrid, times: StepTimes) -> str:
    """All tables that the records allow."""
    records = grid.records
    seconds = sum(r["train_seconds"] + r["stack_evaluate_seconds"] / r["stack"] for r in records)
    cells = cells_of(grid.main)
    parts = [
        f"# Every line at every rate: {grid.model}",
        f"{len(records)} runs, {seconds / 60:.0f} accelerator minutes of training and evaluation.",
        *_tasks(grid),
    ]
    if not any(set(lines) - {BASELINE} and BASELINE in lines for lines in cells.values()):
        return "\n\n".join([*parts, "Too few runs for a comparison."]) + "\n"
    parts += [
        "## Against plain LoRA, each at its own best rate",
        PAIRED,
        comparison(cells, grid.score),
    ]
    first = cells_of(grid.main, least=GRID)
    if first != cells and any(len(lines) > 1 for lines in first.values()):
        parts += [
            "### The same with the seeds that have run at all nine rates alone",
            comparison(first, grid.score),
        ]
    parts += _rest(grid, cells, times)
    return "\n\n".join(parts) + "\n"


def _tasks(grid: ModelGrid) -> list[str]:
    if grid.model == CHOSEN_ON:
        return ["## The tasks, chosen by plain LoRA alone", table(rooms(grid.standard), CHOSEN)]
    names = sorted({r["task"] for r in grid.main})
    how = (
        "all of this model's"
        if kind_of(grid.model).head
        else f"chosen by plain LoRA on {CHOSEN_ON}"
    )
    return [f"Tasks, {how}: {', '.join(names)}."]


def _rest(grid: ModelGrid, cells: Cells, times: StepTimes) -> list[str]:
    common = common_tasks(cells)
    parts = [
        "## A lower final loss, in both forms: one rate for all, and each line tuned",
        "Test loss beside plain LoRA's, nats [95% over tasks] (tasks below).",
        claims_at_rates(cells),
        f"## At fixed rates: test loss above tuned plain LoRA's, mean over {len(common)} tasks",
        f"Tasks on which every line of this table has run: {', '.join(sorted(common))}. Over the seeds that "
        "the line and plain LoRA have both run.",
        rate_table(common),
        f"## At fixed rates: {grid.score}, %",
        rate_table(common, "exact"),
        "## Test loss at the best rate, by task",
        task_table(cells),
    ]
    if text := by_task(cells, grid.score):
        parts += [
            "## By task, where there are several seeds",
            "The loss's interval is Welch's over seeds, on these test items, which all runs of a task share; "
            "of its error over items only a bound is known, as if two runs erred independently. The interval "
            f"of the {grid.score} holds seeds and items.",
            text,
        ]
    if text := grid_forgetting_table(cells):
        parts += ["## Forgetting: the loss on another task", text]
    if text := cost_table(cells, times):
        parts += ["## Cost: to plain LoRA's final held-out loss", _seconds(times), text]
    if ranks := rank_tables(r for r in grid.records if grid.is_compared_on(r["task"])):
        parts += ["## Ranks", *ranks]
    fresh = cells_of(grid.fresh)
    if any(BASELINE in lines and len(lines) > 1 for lines in fresh.values()):
        parts += [
            "## Fresh tasks, on which nothing was chosen",
            f"Tasks: {', '.join(sorted(fresh))}.",
            comparison(fresh, grid.score),
            claims_at_rates(fresh),
        ]
    return parts


def _seconds(times: StepTimes) -> str:
    text = (
        "Medians over tasks. Held-out loss on validation sequences, at the steps at which it was taken, a "
        "straight line between. A star: seconds of the start are the records', in which methods share "
        "statistics of the union of their needs."
    )
    if not times.steps:
        return f"{text} No unstacked step was timed for this model."
    return (
        f"{text} Steps of one adapter alone on {times.device}, by `python -m "
        "benchmarks.quality.step_time`; the last column takes the share of steps saved to be the same for any "
        "number of steps."
    )
