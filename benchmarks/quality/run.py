"""Run a stage of the benchmark: many small runs in one process, resumable.

    python -m benchmarks.quality.run search --data DATA --model PACKED --out OUT --time-limit 400
    python -m benchmarks.quality.run seeds  --records OUT ...
    python -m benchmarks.quality.run sweep --over rank --values 1 4 16 64 --methods vanilla eva ...

Every finished run is a line of ``OUT/records.jsonl``. What is recorded there, or below
``--records``, is not run again; a call stops cleanly at its time limit and the same call goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.quality import stages
from benchmarks.quality.data import Pool, batch_order, default_folder, load_pools, style_of
from benchmarks.quality.experiment import (
    CURVE_PERCENT,
    FULL,
    Experiment,
    curve_steps,
    percent_steps,
)
from benchmarks.quality.full import train_full
from benchmarks.quality.initialise import Initialised, Initialiser
from benchmarks.quality.kinds import KINDS, model_of
from benchmarks.quality.records import (
    RESULTS,
    Record,
    append,
    head,
    provenance,
    read_records,
)
from benchmarks.quality.stacked import Base, Start
from benchmarks.quality.trainer import Job, Outcome, StackTrainer

ROOT = Path(__file__).resolve().parents[2]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CURVE_ROWS = 128
STACK_LENGTH = 80
"""Longest sequences, in tokens, at which a full stack is trained at once; memory goes by tokens."""


class OutOfTime(Exception):
    """The next piece of work would not end within the limit."""


class Clock:
    """Time since the start against a limit."""

    def __init__(self, limit: float | None) -> None:
        self.began, self.limit = time.perf_counter(), limit

    @property
    def gone(self) -> float:
        return time.perf_counter() - self.began

    def check(self, wanted: float) -> None:
        """Raise `OutOfTime` unless `wanted` more seconds are left."""
        if self.limit is not None and self.gone + wanted > self.limit:
            raise OutOfTime


class Bench:
    """Model, data, trainers and starts of one process.

    Args:
        model: the base in float32, on the device to train on.
        data: folder of the prepared tasks.
        out: folder of the records.
        stage: name that the records carry.
        stack: most adapters trained at once, at sequences of up to `STACK_LENGTH` tokens.
        test: whether the test split is scored.
        validation_rows: how many validation sequences are scored at the end.
    """

    def __init__(
        self,
        model: Any,
        data: Path,
        out: Path,
        stage: str,
        *,
        stack: int = 16,
        test: bool = True,
        validation_rows: int = 512,
        test_rows: int = 1024,
        evaluation_rows: int = 128,
        commit: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.device = model.device
        self.cuda = self.device.type == "cuda"
        # A base rounded to bfloat16 once: statistics in float32 and training see the same weights.
        self.model = model
        self.data, self.out, self.stage, self.stack = data, out, stage, stack
        self.test, self.validation_rows, self.test_rows = test, validation_rows, test_rows
        self.evaluation_rows = evaluation_rows
        # Launches cost more than products on a device: few large batches.
        on_device = next(model.parameters()).is_cuda
        self.initialise = Initialiser(model, batch_size=128 if on_device else 32)
        self.clock = clock or Clock(None)
        self.provenance = provenance(commit, self.device)
        self._bases: dict[Any, Base] = {}
        self._trainers: dict[Any, StackTrainer] = {}
        self._slowest: dict[Any, float] = defaultdict(float)
        self._memory: Any = None

    def run(self, experiments: Sequence[Experiment], done: set[str]) -> int:
        """Run what is not done; returns how many records were added. Raises `OutOfTime`."""
        pending = [e for e in experiments if e.id not in done]
        pending = list({e.id: e for e in pending}.values())
        by_task: dict[str, list[Experiment]] = defaultdict(list)
        for experiment in pending:
            by_task[experiment.task].append(experiment)
        added = 0
        with tqdm(total=len(pending), desc=self.stage, unit="run", mininterval=5) as bar:
            for task, members in by_task.items():
                pools = {k: p.to(self.device) for k, p in load_pools(task, self.data).items()}
                style = style_of(task, self.data)
                if any(e.style != style for e in members):
                    raise ValueError(
                        f"the data of {task} in {self.data} have prompts of style '{style}': "
                        f"run with --set style={style}, or name a folder of the other style"
                    )
                try:
                    added += self._task(members, pools, bar)
                finally:
                    self.free()
        return added

    def _task(self, experiments: list[Experiment], pools: dict[str, Pool], bar: Any) -> int:
        """One task's runs: starts seed by seed, so that statistics are shared, stacks when full."""
        waiting: dict[Any, list[tuple[Experiment, Initialised]]] = defaultdict(list)
        added = 0
        most = stack_for(pools["train"], self.stack)

        def statistics_key(e: Experiment) -> tuple[int, int, int]:
            return (e.seed, e.statistics_samples, e.train_samples)

        experiments = sorted(experiments, key=statistics_key)
        try:
            for experiment in experiments:
                self.clock.check(max(5.0 if self.cuda else 0.0, self._slowest[experiment.label]))
                together = [
                    e
                    for e in experiments
                    if e.method != FULL and statistics_key(e) == statistics_key(experiment)
                ]
                began = time.perf_counter()
                if experiment.method == FULL:
                    self._full(experiment, pools)
                    self._slowest[FULL] = max(self._slowest[FULL], time.perf_counter() - began)
                    added += 1
                    bar.update()
                    continue
                try:
                    found = self.initialise(experiment, pools["train"], together)
                except Exception as error:
                    self._fail(experiment, error)
                    bar.update()
                    continue
                took = time.perf_counter() - began
                self._slowest[experiment.label] = max(self._slowest[experiment.label], took)
                key = _stack_key(experiment, found)
                waiting[key].append((experiment, found))
                if len(waiting[key]) == most:
                    added += self._train(key, waiting.pop(key), pools, bar)
        except OutOfTime:
            # Starts that are ready are trained as long as they fit.
            for key, members in waiting.items():
                added += self._train(key, members, pools, bar)
            raise
        for key, members in waiting.items():
            added += self._train(key, members, pools, bar)
        return added

    def _train(
        self,
        key: Any,
        members: list[tuple[Experiment, Initialised]],
        pools: dict[str, Pool],
        bar: Any,
    ) -> int:
        # Stacks differ little in time: one not yet seen is taken for the slowest that was.
        self.clock.check(1.2 * (self._slowest[key] or self._slowest["stack"]))
        began = time.perf_counter()
        first = members[0][0]
        trainer = self.trainer(key, first, members[0][1], pools, len(members))
        jobs = [
            Job(found.start, experiment.learning_rate, batch_rows_of(experiment, pools))
            for experiment, found in members
        ]
        outcomes = trainer.run(jobs, **self._evaluations(first, pools))
        memory = torch.cuda.max_memory_allocated() if self.cuda else None
        for (experiment, found), outcome in zip(members, outcomes, strict=True):
            append(self.out, self._record(experiment, found, outcome, memory))
        took = time.perf_counter() - began
        for name in (key, "stack"):
            self._slowest[name] = max(self._slowest[name], took)
        bar.update(len(members))
        return len(members)

    def _evaluations(self, first: Experiment, pools: dict[str, Pool]) -> dict[str, Any]:
        """What is evaluated, and when: a search looks seldom, and at the validation split only."""
        searching = self.stage == "search"
        scores = {"validation": pools["validation"].first(self.validation_rows)}
        if self.test:
            scores["test"] = pools["test"].first(self.test_rows)
        other = {}
        if "other" in pools and not searching:
            other = {"other": pools["other"].first(self.validation_rows)}
        return {
            "curve": pools["validation"].first(min(CURVE_ROWS, self.validation_rows)),
            "curve_at": (percent_steps if searching else curve_steps)(first.steps),
            "scores": scores | other,
            "start_scores": other,
        }

    def _full(self, experiment: Experiment, pools: dict[str, Pool]) -> None:
        """One run of full fine-tuning."""
        KINDS[experiment.model].seed_head(self.model, experiment.seed)
        outcome = train_full(
            self.model,
            pools["train"],
            batch_rows_of(experiment, pools),
            learning_rate=experiment.learning_rate,
            warmup=experiment.warmup,
            clip=experiment.clip,
            bfloat16=experiment.precision == "bf16",
            **self._evaluations(experiment, pools),
        )
        memory = torch.cuda.max_memory_allocated() if self.cuda else None
        nothing = Initialised(Start({}, {}), 0.0, 0.0)
        append(self.out, self._record(experiment, nothing, outcome, memory))

    def _record(
        self, experiment: Experiment, found: Initialised, outcome: Outcome, memory: int | None
    ) -> Record:
        curve = outcome.curve
        percent = {p: curve[-(-experiment.steps * p // 100)] for p in CURVE_PERCENT}
        record = head(experiment, self.stage) | self.provenance
        record |= {
            "anchored": found.start.anchored,
            "init_seconds": found.seconds,
            "collect_seconds": found.collect_seconds,
            "solve_seconds": found.solve_seconds,
            "train_seconds": outcome.train_seconds / outcome.stack,
            "stack": outcome.stack,
            "stack_train_seconds": outcome.train_seconds,
            "stack_evaluate_seconds": outcome.evaluate_seconds,
            "memory_bytes": memory,
            "diverged": not outcome.finite,
            "train_loss": outcome.train_loss,
            "heldout": {"steps": list(curve), "loss": list(curve.values())},
            "heldout_at_percent": percent,
        }
        for split, (losses, exact) in outcome.scores.items():
            record[split] = {
                "loss": float(losses.mean()),
                "exact": float(exact.mean()),
                "sequences": len(losses),
            }
        if "other" in outcome.start_scores:
            record["other"]["start_loss"] = float(outcome.start_scores["other"][0].mean())
        return record

    def trainer(
        self, key: Any, first: Experiment, found: Initialised, pools: dict[str, Pool], count: int
    ) -> StackTrainer:
        """A trainer of the stage's stack, or of a smaller one for a few left over."""
        size = stack_for(pools["train"], self.stack)
        while size // 2 >= count:
            size //= 2
        if (key, size) not in self._trainers:
            self._trainers[key, size] = StackTrainer(
                self._base(first.model, first.precision),
                stack=size,
                rank=found.start.rank,
                anchored=found.start.anchored,
                scaling=first.scaling,
                train=pools["train"],
                batch_size=first.batch_size,
                max_steps=first.steps,
                warmup=first.warmup,
                clip=first.clip,
                evaluation_rows=self.evaluation_rows,
                graphs=self.cuda,
                memory=self._graph_memory(),
            )
        return self._trainers[key, size]

    def _graph_memory(self) -> Any:
        if self.cuda and self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        return self._memory

    def _base(self, model: str, precision: str) -> Base:
        if (model, precision) not in self._bases:
            base = KINDS[model].base(self.model, _DTYPES[precision], self.cuda)
            self._bases[model, precision] = base
        return self._bases[model, precision]

    def _fail(self, experiment: Experiment, error: Exception) -> None:
        # Places in the checkout, not on the machine.
        text = "".join(traceback.format_exception(error)[-3:]).replace(f"{ROOT}/", "")
        record = head(experiment, self.stage) | self.provenance
        record |= {"error": f"{type(error).__name__}: {error}", "traceback": text[-2000:]}
        append(self.out, record, "failures")
        tqdm.write(f"failed: {experiment.label} on {experiment.task}: {error}")

    def free(self) -> None:
        self._trainers.clear()
        self._memory = None
        self.initialise.forget()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def batch_rows_of(experiment: Experiment, pools: dict[str, Pool]) -> torch.Tensor:
    """Rows of the training pool, ``(steps, batch)``."""
    e = experiment
    return batch_order(len(pools["train"]), e.train_samples, e.seed, e.steps, e.batch_size)


def stack_for(pool: Pool, most: int) -> int:
    """How many adapters train at once on sequences of the pool's length."""
    size, length = most, pool.length
    while size > 1 and size * length > most * STACK_LENGTH:
        size //= 2
    return size


def _stack_key(experiment: Experiment, found: Initialised) -> tuple[Any, ...]:
    """Runs that can share a stack."""
    return (
        found.start.rank,
        found.start.anchored,
        experiment.scaling,
        experiment.steps,
        experiment.batch_size,
        experiment.precision,
        experiment.warmup,
        experiment.clip,
    )


def load_model(
    folder: Path | None, device: torch.device, name: str = "smollm2-135m-instruct"
) -> Any:
    """A base model of `KINDS` from a folder, else from the cache of the benchmarks."""
    return round_base(KINDS[name].load(folder, device))


@torch.no_grad()
def round_base(model: nn.Module) -> nn.Module:
    """Weights rounded to bfloat16 and kept in float32: what training in either precision reads."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return model


def choose_device(name: str | None = None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return device


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
    common = dict(map(_assignment, arguments.set))
    if arguments.stage == "search":
        return stages.search(methods, arguments.tasks, **common)
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


def _assignment(text: str) -> tuple[str, Any]:
    """``"steps=32"`` to a field of ``Experiment`` and its value."""
    name, _, value = text.partition("=")
    known = {f.name for f in fields(Experiment)} - {"task", "method", "settings", "learning_rate"}
    if name not in known:
        raise SystemExit(f"--set {text}: no such setting (there are: {', '.join(sorted(known))})")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    clock_began = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("search", "seeds", "sweep"))
    add_common(parser)
    parser.add_argument("--methods", nargs="+", help="name, or name:key=value;key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(stages.SEEDS))
    parser.add_argument("--rates", type=int, default=2, help="learning rates taken from the search")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="settings of every experiment",
    )
    parser.add_argument("--over", choices=("rank", "train_samples", "statistics_samples"))
    parser.add_argument("--values", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    if arguments.stage == "sweep" and not (arguments.over and arguments.values):
        parser.error("the stage 'sweep' needs --over and --values")
    clock = Clock(arguments.time_limit)
    clock.began = clock_began
    done = read_records([*arguments.records, arguments.out])
    experiments = experiments_of(arguments, list(done.values()))
    left = sum(e.id not in done for e in experiments)
    print(f"{arguments.stage}: {len(experiments)} runs, {left} to do", flush=True)
    if not left:
        return
    bench = Bench(
        load_model(arguments.model, choose_device(), model_of(arguments.tasks)),
        arguments.data,
        arguments.out,
        arguments.stage,
        stack=arguments.stack,
        test=arguments.stage != "search",
        commit=arguments.commit,
        clock=clock,
    )
    try:
        bench.run(experiments, set(done))
        print(f"done in {clock.gone:.0f} s", flush=True)
    except OutOfTime:
        now = read_records([arguments.out])
        left = sum(e.id not in now and e.id not in done for e in experiments)
        print(f"time limit: {left} runs left after {clock.gone:.0f} s; call again", flush=True)


if __name__ == "__main__":
    main()
