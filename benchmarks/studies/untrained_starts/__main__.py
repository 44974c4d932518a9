"""How far a start alone goes: no training step, against plain LoRA trained.

    python -m benchmarks.studies.untrained_starts --methods natural "natural:steps=4" --out OUT --data DATA

Per task and seed: loss and exact match (test split) of the base and of every untrained start; of
plain LoRA after 128 steps on 4,096 samples at its best learning rate; and, so that nobody is
fooled, of plain LoRA trained on the very sequences that the start saw, for as long as the start
took. The share of the loss gap that a start closes is ``(L_base - L_start) / (L_base - L_trained)``.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.quality.arguments import add_common
from benchmarks.quality.bench import Bench
from benchmarks.quality.data.files import load_pools, style_of
from benchmarks.quality.data.reasoning import DEFAULT
from benchmarks.quality.experiment import LEARNING_RATES
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.records import read_records
from benchmarks.quality.stages import BASELINE, best_rates
from benchmarks.quality.time_limit import Clock, OutOfTime
from benchmarks.studies import RESULTS
from benchmarks.studies.untrained_starts.evaluations import TASKS, StartBench
from benchmarks.studies.untrained_starts.table import table


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
    done = read_records([RESULTS, *folders], "untrained_starts")
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
            pools = load_pools(task, arguments.data, DEFAULT)
            pools = {k: p.to(bench.device) for k, p in pools.items()}
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
