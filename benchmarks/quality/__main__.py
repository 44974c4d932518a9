"""Run a stage of the benchmark: many small runs in one process, resumable.

    python -m benchmarks.quality search --data DATA --model PACKED --out OUT --time-limit 400
    python -m benchmarks.quality grid --methods vanilla auto --seeds 0 1 2 ...
    python -m benchmarks.quality grid --methods qera:reference=true --set model=smollm2-135m-instruct+nf4 ...
    python -m benchmarks.quality matched --methods auto:matched=true --at 1e-4 2e-4 ...   starts told their rate
    python -m benchmarks.quality sizes --methods vanilla:size=4.0 --set warmup=0.1 ...   a grid kept by itself
    python -m benchmarks.quality steps --methods vanilla auto --set steps=16 warmup=0.1 ...   other lengths
    python -m benchmarks.quality suggested --methods vanilla auto --records OUT ...   rates of ``suggestions``
    python -m benchmarks.quality seeds  --records OUT ...
    python -m benchmarks.quality sweep --over rank --values 1 4 16 64 --methods vanilla eva ...

Every finished run is a line of ``OUT/records.jsonl``. What this stage has recorded there, or
below ``--records``, is not run again; a call stops cleanly at its time limit and the same call goes on.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.quality import stages
from benchmarks.quality.arguments import add_common, experiments_of
from benchmarks.quality.bench import Bench
from benchmarks.quality.experiment import GRID
from benchmarks.quality.models.loading import choose_device, full_precision, load_model
from benchmarks.quality.records import done_in, read_records
from benchmarks.quality.time_limit import Clock, OutOfTime


def main() -> None:
    clock_began = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("search", *stages.GRIDS, "suggested", "seeds", "sweep"))
    add_common(parser)
    parser.add_argument("--methods", nargs="+", help="name, or name:key=value;key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(stages.SEEDS))
    parser.add_argument("--rates", type=int, default=2, help="learning rates taken from the search")
    parser.add_argument("--at", type=float, nargs="+", default=list(GRID), help="rates of a grid")
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
    known = list(read_records([*arguments.records, arguments.out]).values())
    done = done_in(known, arguments.stage)
    experiments = experiments_of(arguments, known)
    models = {e.model for e in experiments}
    if len(models) > 1:
        parser.error(f"one call trains one model; these tasks need {', '.join(sorted(models))}")
    left = sum(e.id not in done for e in experiments)
    print(f"{arguments.stage}: {len(experiments)} runs, {left} to do", flush=True)
    if not left:
        return
    (model,), device = models, choose_device()
    bench = Bench(
        load_model(arguments.model, device, model),
        arguments.data,
        arguments.out,
        arguments.stage,
        stack=arguments.stack,
        test=arguments.stage != "search",
        commit=arguments.commit,
        clock=clock,
        reference=full_precision(arguments.model, device, model),
    )
    try:
        bench.run(experiments, done)
        print(f"done in {clock.gone:.0f} s", flush=True)
    except OutOfTime:
        done |= done_in(read_records([arguments.out]).values(), arguments.stage)
        left = sum(e.id not in done for e in experiments)
        print(f"time limit: {left} runs left after {clock.gone:.0f} s; call again", flush=True)


if __name__ == "__main__":
    main()
