"""What the commands have in common."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.quality import stages
from benchmarks.quality.data.files import default_folder
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.records import RESULTS, Record, read_records


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=default_folder(), help="prepared tasks")
    parser.add_argument("--model", type=Path, help="folder of a packed model; else the cache's")
    parser.add_argument("--out", type=Path, required=True, help="where records are appended")
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS], help="known records")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing new starts")
    parser.add_argument("--commit", help="written into the records, where git is not at hand")
    parser.add_argument("--stack", type=int, default=16, help="most adapters trained at once")
    parser.add_argument("--tasks", nargs="+", default=list(stages.TASKS))


def experiments_of(arguments: argparse.Namespace, known: list[Record]) -> list[Experiment]:
    methods = arguments.methods or list(stages.METHODS)
    common = dict(map(assignment, arguments.set))
    if arguments.stage == "search":
        return stages.search(methods, arguments.tasks, **common)
    if arguments.stage in stages.GRIDS:
        return stages.grid(methods, arguments.tasks, arguments.seeds, arguments.at, **common)
    if arguments.stage == "suggested":
        found = read_records([*arguments.records, arguments.out], "suggestions").values()
        return stages.suggested(found, methods, arguments.tasks, arguments.seeds, **common)
    if arguments.stage == "seeds":
        return stages.seeds(
            known, methods, arguments.tasks, arguments.seeds, rates=arguments.rates, **common
        )
    return stages.sweep(
        known,
        arguments.over,
        arguments.values,
        methods,
        arguments.tasks,
        arguments.seeds,
        rates=arguments.rates,
        **common,
    )


def assignment(text: str) -> tuple[str, Any]:
    """``"steps=32"`` to a field of ``Experiment`` and its value."""
    name, _, value = text.partition("=")
    known = {f.name for f in fields(Experiment)} - {"task", "method", "settings", "learning_rate"}
    if name not in known:
        raise SystemExit(f"--set {text}: no such setting (there are: {', '.join(sorted(known))})")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
