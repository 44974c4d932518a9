"""Which experiments a stage is made of; later stages read the records of earlier ones."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.quality.data.reasoning import TASKS
from benchmarks.quality.experiment import (
    FULL,
    FULL_RATES,
    GRID,
    LEARNING_RATES,
    Experiment,
)
from benchmarks.quality.models.registry import defaults
from benchmarks.quality.records import Record

METHODS: tuple[str, ...] = (
    "vanilla",
    "vanilla:size=2",
    "lora-da:paper=true",
    "lora-da",
    "filet",
    "lora-one",
    "lora-ga",
    "natural",
    "gaussian",
    "orthogonal",
    "pissa",
    "milora",
    "olora",
    "eva",
    "corda",
    "filet:paper=true",
    "lora-da:scale=calibrated",
    "natural:steps=4",
)
"""As ``name`` or ``name:key=value;key=value``, values in JSON. Plain LoRA, both papers, their peers; slow
starts stand last, so that a call cut short has the rest."""

SEEDS = (0, 1, 2, 3, 4)

GRIDS = ("grid", "matched", "sizes", "heads", "steps")
"""Stages of every line at every rate: the comparison; and, kept apart from its tables, starts that are told
their rate, lines of other sizes of rows or under another schedule, new heads that go a part of the way, and
runs of other numbers of steps."""

SHORT_STEPS = 64

BASELINE = "vanilla"

STANDARD_RANK, STANDARD_STYLE = (
    Experiment.__dataclass_fields__[name].default for name in ("rank", "style")
)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """``"natural:steps=4;length=0.1"`` to a name and settings."""
    name, _, rest = text.partition(":")
    settings = {}
    for pair in filter(None, rest.split(";")):
        key, _, value = pair.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return name, settings


def search(
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = TASKS,
    rates: Sequence[float] = LEARNING_RATES,
    **common: Any,
) -> list[Experiment]:
    """Stage (i): every learning rate of the grid, one seed, half the steps."""
    common.setdefault("steps", SHORT_STEPS)
    found = []
    for task in tasks:
        for text in methods:
            name, settings = parse_method(text)
            fields = defaults(task) | common
            grid = FULL_RATES if name == FULL else rates
            found += [Experiment(task, name, rate, settings=settings, **fields) for rate in grid]
    return found


def grid(
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = TASKS,
    seed_values: Sequence[int] = SEEDS,
    rates: Sequence[float] = GRID,
    **common: Any,
) -> list[Experiment]:
    """Every line at every rate, all seeds and all steps: nothing is chosen before a run.

    Seeds come in turn, so that a call that is cut short has whole grids of the first ones.
    """
    found = []
    for task in tasks:
        fields = defaults(task) | common
        lines = [
            Experiment(task, name, 1.0, settings=s, **fields)
            for name, s in map(parse_method, methods)
        ]
        found += [
            line.at(learning_rate=rate, seed=seed)
            for seed in seed_values
            for line in lines
            for rate in rates
        ]
    return found


def best_rates(
    records: Iterable[Record], count: int, *, by: str = "loss", **match: Any
) -> dict[tuple[str, str], list[float]]:
    """The best learning rates of each ``(task, label)`` on the validation split, best first.

    ``by="loss"`` ranks by mean validation loss over seeds, ``"exact"`` by exact match, loss
    breaking ties. `match` keeps only records whose experiment has these values.
    """
    scores: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in records:
        experiment = record["experiment"]
        if any(experiment.get(key) != value for key, value in match.items()):
            continue
        validation = record["validation"]
        loss = math.inf if validation["loss"] is None else validation["loss"]
        exact = validation["exact"] or 0.0
        scores[record["task"], record["label"]][record["learning_rate"]].append((loss, exact))
    best = {}
    for key, rates in scores.items():

        def badness(rate: float, rates: Mapping[float, list[tuple[float, float]]] = rates) -> Any:
            pairs = rates[rate]
            loss = sum(p[0] for p in pairs) / len(pairs)
            exact = sum(p[1] for p in pairs) / len(pairs)
            return loss if by == "loss" else (-exact, loss)

        best[key] = sorted(rates, key=badness)[:count]
    return best


def seeds(
    records: Iterable[Record],
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = TASKS,
    seed_values: Sequence[int] = SEEDS,
    *,
    rates: int = 2,
    **common: Any,
) -> list[Experiment]:
    """Stage (ii): all seeds at each method's best rates of stage (i), the whole budget."""
    best = best_rates(
        [r for r in records if r["stage"] == "search"],
        rates,
        rank=common.get("rank", STANDARD_RANK),
        style=common.get("style", STANDARD_STYLE),
    )
    return _at_rates(best, methods, tasks, seed_values, [common])


def sweep(
    records: Iterable[Record],
    over: str,
    values: Sequence[int],
    methods: Sequence[str],
    tasks: Sequence[str],
    seed_values: Sequence[int],
    *,
    rates: int = 2,
    **common: Any,
) -> list[Experiment]:
    """Stage (iii): one budget changed at a time, at each method's best rates of stage (i).

    A rank that was searched has rates of its own; others take those of the standard rank.

    `over`: ``"rank"``, ``"train_samples"`` or ``"statistics_samples"``. Few training samples get
    the steps of at most eight epochs, at least sixteen steps.
    """
    searched = [r for r in records if r["stage"] == "search"]
    standard = common.get("rank", STANDARD_RANK)
    style = common.get("style", STANDARD_STYLE)
    found = []
    for value in values:
        change = common | {over: value}
        if over == "train_samples":
            change["steps"] = max(16, min(128, 8 * value // 32))
        best = best_rates(searched, rates, rank=standard, style=style)
        best |= best_rates(searched, rates, rank=change.get("rank", standard), style=style)
        found += _at_rates(best, methods, tasks, seed_values, [change])
    return sorted(found, key=lambda e: list(tasks).index(e.task))


def suggested(
    suggestions: Iterable[Record],
    methods: Sequence[str],
    tasks: Sequence[str],
    seed_values: Sequence[int],
    **common: Any,
) -> list[Experiment]:
    """Every line at the rate that is suggested for it, rounded to two digits: what who tunes nothing gets.

    Args:
        suggestions: records of ``benchmarks.quality.suggestions``; of a line that has several seeds, the first.
        methods: lines.
        tasks: names.
        seed_values: seeds.
        **common: fields of all.
    """
    rates: dict[str, float] = {}
    for record in sorted(suggestions, key=lambda r: r["seed"]):
        line = Experiment.from_json(record["experiment"])
        if "suggestion" in record:
            rates.setdefault(_start_id(line), float(f"{record['suggestion']['value']:.2g}"))
    found, missing = [], []
    for task in tasks:
        for name, settings in map(parse_method, methods):
            fields = defaults(task) | common
            line = Experiment(task, name, 1.0, settings=settings, **fields)
            if _start_id(line) not in rates:
                missing.append(f"'{line.label}' on {task}")
                continue
            found += [
                line.at(learning_rate=rates[_start_id(line)], seed=seed) for seed in seed_values
            ]
    if missing:
        text = f"no rate is suggested for {', '.join(missing)}: run benchmarks.quality.suggestions first"
        if not found:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)
    return found


def _start_id(line: Experiment) -> str:
    """Of all that a suggestion depends on: not the seed, nor the schedule of the run."""
    return line.at(seed=0, warmup=Experiment.warmup).id


def _at_rates(
    best: Mapping[tuple[str, str], list[float]],
    methods: Sequence[str],
    tasks: Sequence[str],
    seed_values: Sequence[int],
    changes: Sequence[Mapping[str, Any]],
) -> list[Experiment]:
    """Experiments at the known rates; what has none is left out with a warning.

    Raises:
        ValueError: no rate is known at all.
    """
    found: list[Experiment] = []
    missing: list[str] = []
    for task in tasks:
        for change in changes:
            for text in methods:
                name, settings = parse_method(text)
                first = Experiment(
                    task, name, 1.0, settings=settings, **(defaults(task) | dict(change))
                )
                if (task, first.label) not in best:
                    missing.append(f"'{first.label}' on {task}")
                    continue
                rates = best[task, first.label]
                found += [
                    first.at(learning_rate=rate, seed=seed)
                    for seed in seed_values
                    for rate in rates
                ]
    if missing:
        text = (
            f"no learning rate is known of {', '.join(dict.fromkeys(missing))}: run the stage 'search' "
            "for it first, and name the folder of its records"
        )
        if not found:
            raise ValueError(text)
        warnings.warn(text, stacklevel=3)
    return found
