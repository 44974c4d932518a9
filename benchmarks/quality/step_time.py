"""Seconds of a training step of one adapter alone, and of every start alone.

    python -m benchmarks.quality.step_time --data DATA --model PACKED --tasks gcd chain_sum \
        --methods auto eva --out benchmarks/quality/results/step_seconds.jsonl

The stages train many adapters at once and share statistics between methods, so the seconds of their records
are shares. Here a stack of one takes the steps of a whole run, as the stages take them, and each method named
by ``--methods`` collects its own statistics alone. Everything runs once before it is timed, and the median
of some repetitions counts. Appended to ``--out``: a line a task with ``step_seconds``, and a line a task and
method with ``start_seconds``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arguments import assignment
from benchmarks.quality.data.files import default_folder, load_pools, model_of_data, style_of
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.records import RESULTS, Record, append, provenance
from benchmarks.quality.stacks import batch_rows_of, statistics_batch
from benchmarks.quality.stages import BASELINE, parse_method
from benchmarks.quality.training.adapters import Base, Start
from benchmarks.quality.training.trainer import Job, StackTrainer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def step_seconds(
    base: Base, pools: dict[str, Pool], experiment: Experiment, start: Start, repeats: int = 3
) -> float:
    """Of one training step of a stack of one: the median of whole runs, after one that is not counted."""
    e = experiment
    trainer = StackTrainer(
        base,
        stack=1,
        rank=start.rank,
        anchored=start.anchored,
        scaling=e.scaling,
        resized=start.resized,
        train=pools["train"],
        batch_size=e.batch_size,
        max_steps=e.steps,
        warmup=e.warmup,
        clip=e.clip,
        graphs=base.device.type == "cuda",
    )
    job = Job(start, e.learning_rate, batch_rows_of(e, pools))
    seconds = [trainer.run([job])[0].train_seconds for _ in range(1 + repeats)]
    return statistics.median(seconds[1:]) / e.steps


def start_seconds(model: Any, experiment: Experiment, train: Pool, repeats: int = 3) -> float:
    """Of one start with its own statistics alone: the median, after one that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        # A new one each time: it keeps what it has solved.
        initialise = Initialiser(model, batch_size=statistics_batch(model))
        seconds.append(initialise(experiment, train).seconds)
    return statistics.median(seconds[1:])


def measure(
    model: Any,
    name: str,
    task: str,
    data: Path,
    methods: Sequence[str] = (),
    repeats: int = 3,
    **common: Any,
) -> list[Record]:
    """The lines of one task: a step's seconds, and those of the starts.

    Args:
        model: the base, on its device.
        name: its name in an experiment.
        task: its data are in the folder `data`.
        data: prepared tasks.
        methods: whose starts are timed.
        repeats: that the median is taken of.
        common: fields of every experiment.
    """
    pools = {key: pool.to(model.device) for key, pool in load_pools(task, data, name).items()}
    fields = dict(kind_of(name).defaults) | {"model": name, "style": style_of(task, data)} | common
    first = Experiment(task, BASELINE, 1e-4, **fields)
    about = {"model": name, "task": task, "rank": first.rank} | provenance(None, model.device)
    start = Initialiser(model)(first, pools["train"]).start
    base = kind_of(name).base(model, _DTYPES[first.precision], model.device.type == "cuda")
    found = [about | {"step_seconds": step_seconds(base, pools, first, start, repeats)}]
    for method, settings in map(parse_method, methods):
        line = first.at(method=method, settings=settings)
        seconds = start_seconds(model, line, pools["train"], repeats)
        found.append(about | {"label": line.label, "start_seconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default_folder(), help="prepared tasks")
    parser.add_argument("--model", type=Path, help="folder of a packed model; else the cache's")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_seconds.jsonl")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--methods", nargs="*", default=[], help="whose starts are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE",
        help="settings of every experiment",
    )  # fmt: skip
    options = parser.parse_args()
    names = {model_of_data(task, options.data) for task in options.tasks}
    if len(names) > 1:
        parser.error(f"one call times one model; these data are of {', '.join(sorted(names))}")
    (name,) = names
    common = dict(map(assignment, options.set))
    name = common.pop("model", name)  # the data's own, quantized
    model = load_model(options.model, choose_device(), name)
    for task in options.tasks:
        for record in measure(
            model, name, task, options.data, options.methods, options.repeats, **common
        ):
            append(options.out.parent, record, options.out.stem)
            print({k: v for k, v in record.items() if k not in ("versions", "commit")}, flush=True)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
