"""A new head, fitted first or drawn at random: plain LoRA and Natural on sentences.

    python -m benchmarks.studies.new_heads --tasks movies tweets --seeds 0 1 --rates 4e-4 1e-3 --out OUT
    python -m benchmarks.studies.new_heads --table

Every run is a line of ``new_heads.jsonl``. `Auto` is the one or the other by what Natural's measured start
takes off the loss, which each record keeps, so it needs no runs of its own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lorainit
from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.bench import Bench
from benchmarks.quality.data.classification import load_labelled, prepare_labelled
from benchmarks.quality.data.files import default_folder
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialised, lora_config, start_of, take_out
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import KINDS
from benchmarks.quality.records import append, read_records
from benchmarks.quality.stacks import batch_rows_of
from benchmarks.quality.time_limit import Clock, OutOfTime
from benchmarks.quality.training.trainer import Job
from benchmarks.studies import RESULTS

MODEL = "all-minilm-l6-v2"

METHODS = {"plain": lorainit.Vanilla(), "natural": lorainit.Natural()}


def started(
    bench: Bench, experiment: Experiment, train: Pool, method: str, fitted: bool
) -> tuple[Initialised, dict[str, Any]]:
    """A start, and what it recorded of itself."""
    KINDS[MODEL].seed_head(bench.model, experiment.seed)
    torch.manual_seed(experiment.seed)
    model = lorainit.get_peft_model(
        bench.model,
        lora_config(experiment),
        method=METHODS[method],
        data=bench.initialise.batches(experiment, train),
        max_sequences=None,
        fit_heads=fitted,
        progress=False,
    )
    origin = model.peft_config["default"].origin
    try:
        found = start_of(model)
    finally:
        take_out(model, bench.model)
    return Initialised(found, 0.0, 0.0), {"heads": origin.heads, "measured": origin.measured}


def study(
    bench: Bench, task: str, seed: int, arguments: argparse.Namespace, done: set[str]
) -> None:
    """One task and seed."""
    path = arguments.data / f"{task}.npz"
    pools = load_labelled(path if path.is_file() else prepare_labelled(task, arguments.data))
    pools = {name: pool.to(bench.device) for name, pool in pools.items()}
    scored = {"validation": pools["validation"].first(arguments.validation)}
    scored["test"] = pools["test"].first(arguments.test)
    common: dict[str, Any] = {"steps": arguments.steps, "batch_size": arguments.batch}
    common |= {"model": MODEL, "precision": "fp32", "train_samples": 2048}
    for fitted in (False, True):
        for method in METHODS:
            first = Experiment(task, "vanilla", arguments.rates[0], seed, **common)
            names = {
                rate: f"{method}-{'fitted' if fitted else 'random'}-{first.at(learning_rate=rate).id}"
                for rate in arguments.rates
            }
            rates = [rate for rate in arguments.rates if names[rate] not in done]
            if not rates:
                continue
            bench.clock.check(5.0)
            found, known = started(bench, first, pools["train"], method, fitted)
            trainer = bench.trainer(("new_heads", task), first, found, pools, len(rates))
            jobs = [Job(found.start, rate, batch_rows_of(first, pools)) for rate in rates]
            for rate, outcome in zip(rates, trainer.run(jobs, scores=scored), strict=True):
                record: dict[str, Any] = {"id": names[rate], "task": task, "seed": seed}
                record |= {"method": method, "fitted": fitted, "learning_rate": rate, **common}
                for split, (losses, exact) in outcome.scores.items():
                    record[split] = {"loss": float(losses.mean()), "exact": float(exact.mean())}
                append(bench.out, record | known | bench.provenance, "new_heads")
                print(record["id"], record["test"], flush=True)


def table() -> str:
    """Mean test loss and accuracy by task, rate and start, in Markdown."""
    rows: dict[tuple[Any, ...], dict[int, tuple[float, float]]] = defaultdict(dict)
    for r in read_records([RESULTS], "new_heads").values():
        key = (r["task"], r["learning_rate"], r["method"], r["fitted"])
        rows[key][r["seed"]] = (r["test"]["loss"], 100 * r["test"]["exact"])
    lines = ["| task | rate | start | head | seeds | test loss | right, % |", "|" + " --- |" * 7]
    for (task, rate, method, fitted), found in sorted(rows.items()):
        loss, exact = np.mean(list(found.values()), axis=0)
        head = "fitted" if fitted else "random"
        lines.append(
            f"| {task} | {rate:g} | {method} | {head} | {len(found)} | {loss:.4f} | {exact:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["movies", "tweets"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--validation", type=int, default=512, help="sequences scored")
    parser.add_argument("--test", type=int, default=1024, help="sequences scored")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "new-heads")
    parser.add_argument("--table", action="store_true", help="only print what is recorded")
    parser.add_argument("--data", type=Path, default=default_folder(), help="prepared tasks")
    parser.add_argument("--model", type=Path, help="folder of a packed model; else the cache's")
    parser.add_argument("--time-limit", type=float, help="seconds after which nothing new starts")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    done = set(read_records([RESULTS, arguments.out], "new_heads"))
    model = load_model(arguments.model, choose_device(), MODEL)
    clock = Clock(arguments.time_limit)
    bench = Bench(
        model, arguments.data, arguments.out, "new_heads", commit=arguments.commit, clock=clock
    )
    try:
        for seed in arguments.seeds:
            for task in arguments.tasks:
                study(bench, task, seed, arguments, done)
                bench.free()
    except OutOfTime:
        print("out of time: the same call goes on from here")


if __name__ == "__main__":
    main()
