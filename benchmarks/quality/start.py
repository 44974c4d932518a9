"""How far a start alone goes: no training step, against plain LoRA trained.

    python -m benchmarks.quality.start --methods natural "natural:steps=4" --out OUT --data DATA

Per task and seed: loss and exact match (test split) of the base and of every untrained start; of
plain LoRA after 128 steps on 4,096 samples at its best learning rate; and, so that nobody is
fooled, of plain LoRA trained on the very sequences that the start saw, for as long as the start
took. The share of the loss gap that a start closes is ``(L_base - L_start) / (L_base - L_trained)``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.quality.data import Pool, batch_order, load_pools, style_of
from benchmarks.quality.experiment import LEARNING_RATES, Experiment
from benchmarks.quality.initialise import Initialised
from benchmarks.quality.records import Record, append, read_records
from benchmarks.quality.run import (
    Bench,
    Clock,
    OutOfTime,
    add_common,
    choose_device,
    load_model,
    stack_for,
)
from benchmarks.quality.stages import BASELINE, best_rates, parse_method
from benchmarks.quality.trainer import Job, Outcome

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
        append(self.bench.out, record, "start")
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


def table(done: dict[str, Record]) -> str:
    """Mean and spread (standard deviation) over seeds, in Markdown."""
    records = list(done.values())
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record["kind"]].append(record)
    trained: dict[tuple[str, int], Record] = {}
    for task in {r["task"] for r in kinds["trained"]}:
        mine = [r for r in kinds["trained"] if r["task"] == task]
        by_rate: dict[float, list[float]] = defaultdict(list)
        for r in mine:
            loss = r["validation"]["loss"]
            by_rate[r["learning_rate"]].append(1e9 if loss is None else loss)
        rate = min(by_rate, key=lambda x: float(np.mean(by_rate[x])))
        trained |= {(task, r["seed"]): r for r in mine if r["learning_rate"] == rate}
    base = {(r["task"], r["seed"]): r for r in kinds["start"] if r["label"] == BASELINE}
    matched = {(r["task"], r["seed"], r["label"]): r for r in kinds["matched"]}
    rows: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for r in kinds["start"]:
        at = (r["task"], r["seed"])
        if r["label"] == BASELINE or at not in trained or at not in base:
            continue
        gap = base[at]["loss"] - trained[at]["loss"]
        same = matched.get((*at, r["label"]))
        rows[r["task"], r["label"]].append(
            [
                base[at]["loss"],
                r["loss"],
                trained[at]["loss"],
                100 * (base[at]["loss"] - r["loss"]) / gap,
                100 * r["exact"],
                100 * trained[at]["exact"],
                r["init_seconds"],
                100 * (base[at]["loss"] - same["loss"]) / gap if same else np.nan,
                100 * same["exact"] if same else np.nan,
            ]
        )
    header = (
        "task | start | base loss | start loss | LoRA trained | gap closed, % | exact, % | "
        "LoRA's exact, % | seconds | LoRA, same data and time: gap closed, % | its exact, %"
    )
    lines = [f"| {header} |", "|" + " --- |" * 11]
    for (task, label), values in sorted(rows.items()):
        data = np.array(values)
        cells = []
        for column in data.T:
            column = column[~np.isnan(column)]
            spread = f" ± {column.std(ddof=1):.2f}" if len(column) > 1 else ""
            cells.append(f"{column.mean():.2f}{spread}" if len(column) else "–")
        lines.append(f"| {task} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    clock_began = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.set_defaults(tasks=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["natural"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--matched", nargs="*", default=[], help="methods to match in time")
    parser.add_argument("--matched-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    arguments = parser.parse_args()
    folders = [*arguments.records, arguments.out]
    done = read_records(folders, "start")
    if arguments.table:
        print(table(done))
        return
    clock = Clock(arguments.time_limit)
    clock.began = clock_began
    known = [r for r in read_records(folders).values() if r["stage"] == "search"]
    best = best_rates(known, 2, rank=8)
    bench = Bench(
        load_model(arguments.model, choose_device()),
        arguments.data,
        arguments.out,
        "start",
        stack=arguments.stack,
        commit=arguments.commit,
        clock=clock,
    )
    try:
        for task in arguments.tasks:
            pools = {k: p.to(bench.device) for k, p in load_pools(task, arguments.data).items()}
            one = StartBench(bench, pools, done)
            style = style_of(task, arguments.data)
            for seed in arguments.seeds:
                clock.check(15.0)
                one.untrained(task, seed, arguments.methods, style=style)
            clock.check(15.0)
            rates = best.get((task, BASELINE), arguments.rates)
            one.trained(task, arguments.seeds, rates, style=style)
            for seed in arguments.matched_seeds:
                for method in arguments.matched:
                    clock.check(20.0)
                    one.matched(task, seed, method, arguments.rates, style=style)
            bench.free()
            print(json.dumps({"task": task, "seconds": round(clock.gone)}), flush=True)
    except OutOfTime:
        print(f"time limit after {clock.gone:.0f} s; call again to go on", flush=True)
    if torch.cuda.is_available():
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    print(table(done))


if __name__ == "__main__":
    main()
