"""What is measured of starts before any training: line after line, each started as the stages start it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import lorainit
from benchmarks.quality import stages
from benchmarks.quality.arguments import add_common, assignment
from benchmarks.quality.data.files import load_pools
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialiser, lora_config, take_out
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import defaults, kind_of, model_of
from benchmarks.quality.records import append, head, provenance, read_records
from benchmarks.quality.stacks import statistics_batch
from benchmarks.quality.time_limit import Clock, OutOfTime

Batches = list[dict[str, Tensor]]

Measure = Callable[[Any, Experiment, Batches], dict[str, Any]]
"""Of the base model, a line and the first of its training sequences, what a record holds beside its head."""


def add_lines(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which lines."""
    add_common(parser)
    parser.add_argument("--methods", nargs="+", default=list(stages.METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE")


def measure_lines(
    options: argparse.Namespace, stage: str, measure: Measure, seconds: float
) -> None:
    """A record of every line that has none in ``{stage}.jsonl``, appended there.

    Args:
        options: of `add_lines`.
        stage: the records' name.
        measure: makes the record.
        seconds: that one line takes, about.
    """
    clock = Clock(options.time_limit)
    done = read_records([*options.records, options.out], stage)
    common = dict(map(assignment, options.set))
    name = common.get("model") or model_of(options.tasks)
    model = load_model(options.model, choose_device(), name)
    initialiser = Initialiser(model, batch_size=min(32, statistics_batch(model)))
    try:
        for task in options.tasks:
            train = load_pools(task, options.data, name)["train"].to(model.device)
            for seed in options.seeds:
                for method, settings in map(stages.parse_method, options.methods):
                    fields = defaults(task) | common
                    line = Experiment(task, method, 1.0, seed=seed, settings=settings, **fields)
                    if line.id in done:
                        continue
                    clock.check(seconds)
                    record = head(line, stage) | provenance(options.commit, model.device)
                    record |= measure(model, line, initialiser.batches(line, train))
                    append(options.out, record, stage)
                    print(task, line.label, line.rank, seed, flush=True)
            initialiser.forget()
    except OutOfTime:
        print("time limit; call again")


@contextmanager
def started(model: Any, line: Experiment, batches: Batches) -> Iterator[Any]:
    """The model with the line's start; afterwards as it was."""
    kind_of(line.model).seed_head(model, line.seed)
    torch.manual_seed(line.seed)
    wrapped = lorainit.get_peft_model(
        model, lora_config(line), method=line.build_method(), data=batches, max_sequences=None,
        progress=False,
    )  # fmt: skip
    try:
        yield wrapped
    finally:
        take_out(wrapped, model)
