"""DPO from every start, at tuned and suggested rates: loss, reward margin and accuracy on pairs not trained on.

    python -m benchmarks.preference --out preference.jsonl --time-limit 540    # again to go on
    python -m benchmarks.preference --out preference.jsonl --table

Every rate is tried on the first ``--tuning-seeds`` seeds; the rate with the lowest validation loss, and the
suggested one where the package suggests one, are then run on all ``--seeds``. One line of JSON a run; runs
whose line is there are passed over, and lines of other settings are left alone. Several processes may work on
one file: ``--part 0/3``, ``--part 1/3``, ``--part 2/3``, and again for what the grid's end makes known.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.json_lines import read, say
from benchmarks.common.models import smollm2_folder
from benchmarks.common.provenance import provenance
from benchmarks.preference.plan import pending
from benchmarks.preference.table import by_rate, table
from benchmarks.preference.training import SUGGESTED, Bench, Settings


def records_of(path: Path, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a file that were made with these settings."""
    records = read(path) if path.exists() else []
    return [r for r in records if all(r.get(name) == value for name, value in shared.items())]


def work(options: argparse.Namespace, settings: Settings, shared: dict[str, Any]) -> str:
    """Make the runs that are missing, within the time limit; says how it ended."""
    began = time.perf_counter()
    part, parts = map(int, options.part.split("/"))
    methods, rates = options.methods.split(","), options.rates.split(",")
    planned = options.seeds, min(options.tuning_seeds, options.seeds)
    place = provenance(torch.device("cpu" if options.cpu else "cuda"))
    bench = None
    longest = 0.0
    while True:
        runs = pending(records_of(options.out, shared), methods, rates, *planned)
        # By their content, so that the parts agree whatever is done meanwhile.
        mine = [run for run in runs if sum(map(ord, "/".join(map(str, run)))) % parts == part]
        if not mine:
            return f"{len(runs)} runs of other parts are left" if runs else "all runs are made"
        if bench is None:
            bench = Bench(options.model or smollm2_folder(), settings, cpu=options.cpu)
        gone = time.perf_counter() - began
        if gone + longest > options.time_limit:
            return f"out of time with {len(mine)} or more runs left: call again to go on"
        method, rate, seed = mine[0]
        found = {"method": method, "asked_rate": rate, "seed": seed}
        found |= bench.run(method, rate, seed)
        say(shared | found | {"provenance": place}, options.out)
        longest = max(longest, time.perf_counter() - began - gone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--methods", default="vanilla,lora-da,eva,auto")
    parser.add_argument("--rates", default=f"3e-5,1e-4,3e-4,1e-3,3e-3,{SUGGESTED}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--part", default="0/1", help="which of how many processes this is")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds; no run starts late")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--table", action="store_true")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    options = parser.parse_args()
    options.cpu = options.cpu or not torch.cuda.is_available()
    settings = Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)})
    model = options.model.name if options.model else "SmolLM2-135M-Instruct"
    shared = {"model": model, **dataclasses.asdict(settings)}
    if not options.table:
        print(work(options, settings, shared))
    records = records_of(options.out, shared)
    print(f"{table(records)}\n\n{by_rate(records)}")


if __name__ == "__main__":
    main()
