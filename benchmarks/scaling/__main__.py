"""One start over several processes, beside one: torchrun, JSON lines as it goes.

    torchrun --nproc-per-node 1 -m benchmarks.scaling --out FOLDER     first: the reference
    torchrun --nproc-per-node 2 -m benchmarks.scaling --out FOLDER
    torchrun --nproc-per-node 2 -m benchmarks.scaling --out FOLDER --tiny      seconds, on gloo
    python -m benchmarks.scaling --collect FOLDER --table      keep the lines, print the tables

All launches see the same sequences, in the same batches, shared out. The one-process launch leaves
sketches of its statistics in the folder, and every later one is compared with them: of a statistic
``T`` the sketch is ``P^T T Q`` with fixed Gaussian ``P`` and ``Q`` of 16 columns, so that the norm of a
difference of sketches estimates that of the difference. Weights are random, as in `benchmarks.speed`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import json_lines
from benchmarks.common.clock import cleared, limited
from benchmarks.scaling.cases import plan_of
from benchmarks.scaling.measure import provenance, run_case, run_links
from benchmarks.scaling.processes import Machine
from benchmarks.scaling.records import read_folder
from benchmarks.scaling.tables import tables

RESULTS = Path(__file__).parent / "results" / "scaling.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for JSON lines and sketches")
    parser.add_argument(
        "--collect", type=Path, help="keep a folder's lines as results/scaling.json"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scaling.md")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--kinds", nargs="+", default=["plain", "fsdp"], choices=["plain", "fsdp"])
    parser.add_argument("--batch", type=int, help="sequences a batch, of the largest case alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.collect:
        RESULTS.write_text(json.dumps(read_folder(options.collect), indent=1) + "\n")
    if options.table:
        print(tables(json.loads(RESULTS.read_text())))
    if options.collect or options.table:
        return 0
    if options.out is None:
        parser.error("--out is needed to measure")
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=100),
        device_id=device if cuda else None,
    )
    machine = Machine(device)
    path = folder / f"scaling-{machine.world}.jsonl"

    def say(record: dict[str, Any]) -> None:
        if machine.rank == 0 or "error" in record:
            json_lines.say({"rank": machine.rank, "processes": machine.world, **record}, path)

    say({"name": "provenance", **provenance(machine)})
    works: list[tuple[dict[str, Any], int, Callable[[], dict[str, Any]]]] = [
        (
            {"name": case.kind, **asdict(case)},
            case.limit,
            lambda c=case: run_case(c, machine, folder),
        )
        for case in plan_of(machine.world, options.kinds, tiny=options.tiny, batch=options.batch)
    ]
    works.insert(0, ({"name": "links"}, 60, lambda: run_links(machine)))
    for record, limit, work in works:
        machine.seconds = {}
        try:
            with limited(limit):
                record |= work()
            cleared()
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
            record["trace"] = traceback.format_exc()[-1500:]
            say(record | {"seconds": machine.seconds})
            # The others may stand in a collective that this process has left.
            sys.stdout.flush()
            os._exit(1)
        say(record | {"seconds": machine.seconds})
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
