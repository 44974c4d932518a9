"""Untrained starts, and plain LoRA trained beside them, of one task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.quality.bench import Bench
from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialised
from benchmarks.quality.records import Record, append
from benchmarks.quality.stacks import stack_for
from benchmarks.quality.stages import BASELINE, parse_method
from benchmarks.quality.training.trainer import Job, Outcome

TASKS = (
    "chain_sum",
    "family_relationships",
    "letter_counting",
    "simple_equations",
    "gsm_symbolic",
)


def summary(outcome: Outcome, split: str = "test") -> dict[str, float]:
    losses, exact = outcome.scores[split]
    return {"loss": float(losses.mean()), "exact": float(exact.mean())}


class StartBench:
    """One task's evaluations; every piece is a record, so a stopped call goes on."""

    def __init__(self, bench: Bench, pools: dict[str, Pool], done: dict[str, Record]) -> None:
        self.bench, self.pools, self.done = bench, pools, done

    def train(
        self, experiments: Sequence[Experiment], starts: Sequence[Initialised]
    ) -> list[Outcome]:
        """Runs of one number of steps, in stacks; zero steps evaluate the starts."""
        outcomes: list[Outcome | None] = [None] * len(experiments)
        groups: dict[Any, list[int]] = defaultdict(list)
        size = stack_for(self.pools["train"], self.bench.stack)
        for i, found in enumerate(starts):
            groups[found.start.rank, found.start.anchored].append(i)
        for (rank, anchored), members in groups.items():
            for first in range(0, len(members), size):
                chunk = members[first : first + size]
                lead = experiments[chunk[0]]
                room = 128 if lead.steps <= 128 else 1 << (lead.steps - 1).bit_length()
                key = ("start", lead.task, rank, anchored, lead.scaling, room)
                trainer = self.bench.trainer(
                    key, lead.at(steps=room), starts[chunk[0]], self.pools, len(chunk)
                )
                jobs = [self._job(experiments[i], starts[i]) for i in chunk]
                scores = {k: self.pools[k] for k in ("validation", "test")}
                for i, outcome in zip(chunk, trainer.run(jobs, scores=scores), strict=True):
                    outcomes[i] = outcome
        return [o for o in outcomes if o is not None]

    def _job(self, e: Experiment, found: Initialised) -> Job:
        pool = len(self.pools["train"])
        order = batch_order(pool, e.train_samples, e.seed, e.steps, e.batch_size)
        return Job(found.start, e.learning_rate, order)

    def starts(self, experiments: Sequence[Experiment]) -> list[Initialised]:
        """A start for each."""
        train = self.pools["train"]
        return [self.bench.initialise(e, train, experiments) for e in experiments]

    def put(self, record: Record) -> None:
        record |= self.bench.provenance
        append(self.bench.out, record, "untrained_starts")
        self.done[record["id"]] = record

    def untrained(self, task: str, seed: int, methods: Sequence[str], **common: Any) -> None:
        """Base and starts of one seed."""
        wanted = []
        for text in [BASELINE, *methods]:
            name, settings = parse_method(text)
            experiment = Experiment(task, name, 1e-3, seed, settings, **(common | {"steps": 0}))
            if f"start-{experiment.id}" not in self.done:
                wanted.append(experiment)
        if not wanted:
            return
        starts = self.starts(wanted)
        for experiment, found, outcome in zip(
            wanted, starts, self.train(wanted, starts), strict=True
        ):
            self.put(
                {
                    "id": f"start-{experiment.id}",
                    "kind": "start",
                    "task": task,
                    "seed": seed,
                    "label": experiment.label,
                    "init_seconds": found.seconds,
                    **summary(outcome),
                }
            )

    def trained(
        self, task: str, seeds: Sequence[int], rates: Sequence[float], **common: Any
    ) -> None:
        """Plain LoRA on the whole budget."""
        wanted = [
            Experiment(task, BASELINE, rate, seed, **common) for seed in seeds for rate in rates
        ]
        wanted = [e for e in wanted if f"trained-{e.id}" not in self.done]
        for experiment, outcome in zip(
            wanted, self.train(wanted, self.starts(wanted)), strict=True
        ):
            self.put(
                {
                    "id": f"trained-{experiment.id}",
                    "kind": "trained",
                    "task": task,
                    "seed": experiment.seed,
                    "learning_rate": experiment.learning_rate,
                    "validation": summary(outcome, "validation"),
                    **summary(outcome),
                }
            )

    def matched(
        self, task: str, seed: int, method: str, rates: Sequence[float], **common: Any
    ) -> None:
        """Plain LoRA on the start's own sequences, for the start's own time."""
        name, settings = parse_method(method)
        label = Experiment(task, name, 1e-3, settings=settings).label
        key = f"matched-{task}-{seed}-{label}"
        start = next(
            r
            for r in self.done.values()
            if r["kind"] == "start" and (r["task"], r["seed"], r["label"]) == (task, seed, label)
        )
        if key in self.done:
            return
        sequences = min(256, common.pop("train_samples", 256))
        probe = Experiment(task, BASELINE, 1e-3, seed, steps=16, train_samples=sequences, **common)
        (alone,) = self.starts([probe])
        self.train([probe], [alone])
        took = self.train([probe], [alone])[0].train_seconds / probe.steps
        steps = max(1, round(start["init_seconds"] / took))
        runs = [probe.at(steps=steps, learning_rate=rate) for rate in rates]
        outcomes = self.train(runs, self.starts(runs))
        best = min(
            range(len(runs)),
            key=lambda i: np.nan_to_num(summary(outcomes[i], "validation")["loss"], nan=1e9),
        )
        self.put(
            {
                "id": key,
                "kind": "matched",
                "task": task,
                "seed": seed,
                "label": label,
                "steps": steps,
                "seconds": start["init_seconds"],
                "learning_rate": runs[best].learning_rate,
                **summary(outcomes[best]),
            }
        )
