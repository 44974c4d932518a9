"""Model, data, trainers and starts of one process: experiments in, records out."""

from __future__ import annotations

import gc
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.data.files import load_pools, style_of
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import FULL, Experiment
from benchmarks.quality.initialization import Initialised, Initialiser
from benchmarks.quality.models.registry import kind_of
from benchmarks.quality.outcomes import evaluations, measured
from benchmarks.quality.records import append, head, provenance
from benchmarks.quality.stacks import batch_rows_of, stack_for, stack_key, statistics_batch
from benchmarks.quality.time_limit import Clock, OutOfTime
from benchmarks.quality.training.adapters import Base, Start
from benchmarks.quality.training.full_fine_tuning import train_full
from benchmarks.quality.training.trainer import Job, Outcome, StackTrainer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        reference: the full-precision model of a quantized one.
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
        reference: Any = None,
    ) -> None:
        self.device = model.device
        self.cuda = self.device.type == "cuda"
        # A base rounded to bfloat16 once: statistics in float32 and training see the same weights.
        self.model = model
        self.data, self.out, self.stage, self.stack = data, out, stage, stack
        self.test, self.validation_rows, self.test_rows = test, validation_rows, test_rows
        self.evaluation_rows = evaluation_rows
        self.initialise = Initialiser(
            model, batch_size=statistics_batch(model), reference=reference
        )
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
                (model,) = {e.model for e in members}
                pools = load_pools(task, self.data, model)
                pools = {k: p.to(self.device) for k, p in pools.items()}
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
                key = stack_key(experiment, found)
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
            self._append(experiment, found, outcome, memory)
        took = time.perf_counter() - began
        for name in (key, "stack"):
            self._slowest[name] = max(self._slowest[name], took)
        bar.update(len(members))
        return len(members)

    def _evaluations(self, first: Experiment, pools: dict[str, Pool]) -> dict[str, Any]:
        test_rows = self.test_rows if self.test else 0
        return evaluations(first, pools, self.stage, self.validation_rows, test_rows)

    def _append(
        self, experiment: Experiment, found: Initialised, outcome: Outcome, memory: int | None
    ) -> None:
        record = head(experiment, self.stage) | self.provenance
        append(self.out, record | measured(experiment, found, outcome, memory))

    def _full(self, experiment: Experiment, pools: dict[str, Pool]) -> None:
        """One run of full fine-tuning."""
        kind_of(experiment.model).seed_head(self.model, experiment.seed)
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
        self._append(experiment, nothing, outcome, memory)

    def trainer(
        self, key: Any, first: Experiment, found: Initialised, pools: dict[str, Pool], count: int
    ) -> StackTrainer:
        """A trainer of the stage's stack, or of a smaller one for a few left over."""
        size = stack_for(pools["train"], self.stack)
        while size // 2 >= count:
            size //= 2
        if (key, size) not in self._trainers:
            self._make_room()
            self._trainers[key, size] = StackTrainer(
                self._base(first.model, first.precision),
                stack=size,
                rank=found.start.rank,
                anchored=found.start.anchored,
                scaling=first.scaling,
                resized=found.start.resized,
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
            base = kind_of(model).base(self.model, _DTYPES[precision], self.cuda)
            self._bases[model, precision] = base
        return self._bases[model, precision]

    def _fail(self, experiment: Experiment, error: Exception) -> None:
        # Places in the checkout, not on the machine.
        text = "".join(traceback.format_exception(error)[-3:]).replace(f"{REPOSITORY}/", "")
        record = head(experiment, self.stage) | self.provenance
        record |= {"error": f"{type(error).__name__}: {error}", "traceback": text[-2000:]}
        append(self.out, record, "failures")
        tqdm.write(f"failed: {experiment.label} on {experiment.task}: {error}")

    def _make_room(self) -> None:
        """Two trainers with their captured graphs do not fit on every card: drop the one before."""
        if self.cuda and self._trainers:
            free, whole = torch.cuda.mem_get_info(self.device)
            if free < whole / 2:
                self._trainers.clear()
                # The pool goes with the last graph of it; its handle must not outlive it.
                self._memory = None
                gc.collect()
                torch.cuda.empty_cache()

    def free(self) -> None:
        self._trainers.clear()
        self._memory = None
        self.initialise.forget()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
