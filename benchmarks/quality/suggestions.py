"""The suggested learning rate of every line, beside which `suggested_rates.py` sets the rates of the grid.

    python -m benchmarks.quality.suggestions --data DATA --model PACKED --out OUT --methods vanilla pissa \
        --tasks gcd --set rank=8 style=chat

For each task, line, rank and seed a start is made as the stages make it, and a rate is suggested for it on the
first training sequences. One JSON line each in ``OUT/suggestions.jsonl``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--methods", nargs="+", default=list(stages.METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    clock = Clock(options.time_limit)
    done = read_records([*options.records, options.out], "suggestions")
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
                    clock.check(2.0)
                    record = head(line, "suggestions") | provenance(options.commit, model.device)
                    record |= suggested(model, line, train, initialiser)
                    append(options.out, record, "suggestions")
                    print(task, line.label, line.rank, seed, record.get("suggestion"), flush=True)
            initialiser.forget()
    except OutOfTime:
        print("time limit; call again")


def suggested(model: Any, line: Experiment, train: Any, initialiser: Initialiser) -> dict[str, Any]:
    """What is suggested for one start, and the seconds that it takes."""
    method = line.build_method()
    kind_of(line.model).seed_head(model, line.seed)
    batches = initialiser.batches(line, train)
    torch.manual_seed(line.seed)
    wrapped = lorainit.get_peft_model(
        model, lora_config(line), method=method, data=batches, max_sequences=None, progress=False
    )
    try:
        began = time.perf_counter()
        try:
            found = lorainit.suggest_learning_rate(wrapped, batches, progress=False)
        except lorainit.errors.LorainitError as error:
            return {"refused": str(error)}
        return {"suggestion": asdict(found), "seconds": time.perf_counter() - began}
    finally:
        take_out(wrapped, model)


if __name__ == "__main__":
    main()
