"""Figures of the kept records that several blocks say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.analysis.grid_comparison import differences
from benchmarks.quality.analysis.grid_report import by_grid_model
from benchmarks.quality.analysis.rate_grid import BASELINE, Cells, cells_of
from benchmarks.quality.analysis.rate_tables import gaps_at
from benchmarks.quality.analysis.run_lengths import Lengths, by_length
from benchmarks.quality.analysis.suggested_rates import Case, cases
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.choose import CHOSEN
from benchmarks.quality.data.reasoning import KNOWN
from benchmarks.quality.experiment import GRID
from benchmarks.quality.records import RESULTS, Record, read_records
from benchmarks.quality.stages import STANDARD_RANK
from benchmarks.quantized import recovery_tables

MODEL = "smollm2-135m-instruct"


NAMES = {
    BASELINE: "plain LoRA",
    "auto": "**Auto**",
    "vanilla(size=2)": "plain LoRA, rows twice as long",
    "random(like=natural)": "Random(like=Natural): Natural's sizes, random directions",
    "lora-da": "LoRA-DA",
    "lora-da(scale=calibrated)": "LoRA-DA, length measured",
    "lora-ga": "LoRA-GA",
    "lora-one": "LoRA-One",
    "cg-lora": "CG-LoRA",
    "filet": "FILet",
    "natural": "Natural",
    "natural(steps=4)": "Natural, four steps",
    "pissa": "PiSSA",
    "eva": "EVA",
}
"""What a line is called, by label."""


def named(labels: Iterable[str]) -> dict[str, str]:
    """These lines of `NAMES`, in this order."""
    return {label: NAMES[label] for label in labels}


@cache
def own_records(model: str = MODEL) -> tuple[Record, ...]:
    """Every run of a model, of any stage."""
    known = read_records([RESULTS]).values()
    return tuple(r for r in known if r["experiment"]["model"] == model)


@cache
def grid() -> tuple[Record, ...]:
    """Every run of the stage "grid"."""
    return tuple(r for r in read_records([RESULTS]).values() if r["stage"] == "grid")


def of_chosen(records: Iterable[Record]) -> list[Record]:
    """Of language tasks, those that plain LoRA's records chose: without the fresh ones."""
    return [r for r in records if r["task"] in CHOSEN or r["task"] not in KNOWN]


@cache
def grid_cells(model: str = MODEL) -> Cells:
    """Of a model at the standard rank, on the chosen tasks."""
    mine = [r for r in grid() if r["rank"] == STANDARD_RANK and r["experiment"]["model"] == model]
    return cells_of(of_chosen(mine))


@cache
def fresh_cells(model: str = MODEL) -> Cells:
    """Of a language model at the standard rank, on the tasks on which nothing was chosen."""
    return cells_of(next(g for g in by_grid_model(grid()) if g.model == model).fresh)


@cache
def lengths() -> Lengths:
    """Of the language model on the chosen tasks, by number of steps."""
    return by_length(of_chosen(own_records()))


@cache
def quantized_cells(grid_name: str, model: str = MODEL) -> Cells:
    """A language model's runs on a base quantized to one grid of ``benchmarks.quantized``.

    At the rates that every seed ran; the first seed ran two lower ones and a higher one, too.
    """
    mine = (r for r in grid() if r["experiment"]["model"] == f"{model}+{grid_name}")
    return cells_of(mine, rates=GRID[2:8])


@cache
def rate_cases(model: str | None = MODEL) -> tuple[Case, ...]:
    """Lines of a model, or of all, that have a grid and a suggested rate."""
    found = cases(grid(), read_records([RESULTS], "suggestions").values())
    return tuple(case for case in found if model in (None, case.model))


@cache
def recovery() -> tuple[dict[str, Any], ...]:
    """Starts on quantized bases before training, of all models."""
    return tuple(recovery_tables.read())


def recovered_on_text(kind: str) -> list[recovery_tables.Record]:
    """Of SmolLM2 on a grid, with statistics of the quantized model, on plain text."""
    found = recovery_tables.of(recovery(), model="SmolLM2-135M", kind=kind, data="text")
    return [r for r in found if r["statistics"] != "full"]


def start_seconds(name: str) -> float:
    """Of a whole start in the speed benchmark."""
    path = REPOSITORY / "benchmarks" / "speed" / "results" / "speed.jsonl"
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return float(next(r["seconds"]["total"] for r in records if r["name"] == name))


def at_rate(label: str, rate: float, cells: Cells | None = None) -> Mean:
    """Test loss of a line above plain LoRA's, both at one rate, over the tasks of `cells` (`grid_cells`)."""
    return Mean.of(gaps_at(grid_cells() if cells is None else cells, label, rate))


def beside_plain(label: str, cells: Cells) -> tuple[Mean, list[str]]:
    """A line's tuned loss beside plain LoRA's; and as text: tasks and seeds, that, points, the loss at 1e-4."""
    found = differences(cells)[label]
    loss, points = (Mean.of([getattr(d, key) for d in found]) for key in ("loss", "exact"))
    seeds = min(d.seeds for d in found)
    low = at_rate(label, 1e-4, cells)
    return loss, [f"{loss.tasks} x {seeds}", str(loss), points.rounded(1), str(low)]


def tuned(label: str, cells: Cells | None = None) -> Mean:
    """The same, each at its own best rate by validation loss."""
    return Mean.of([d.loss for d in differences(grid_cells() if cells is None else cells)[label]])
