"""How long a start takes, beside its floor: one command, JSON lines as it goes.

    python -m benchmarks.speed --out speed.jsonl     the device's own plan: 7B on CUDA, 135M on a CPU
    python -m benchmarks.speed --device cpu --out speed_cpu.jsonl      the plan of a CPU
    python -m benchmarks.speed --shape tiny          every case on a CPU at tiny size, to see that it runs
    python -m benchmarks.speed --table speed.jsonl   tables, and docs/images/speed.png
    python -m benchmarks.speed --only "floor, 64 x 512" "LoRA-DA within" --out blocks.jsonl   a budget
    python -m benchmarks.speed --only "floor" "Auto" "QERA, 7B" "EVA" --out whole_starts.jsonl   others

The floor is one forward and backward with the gradients of all weights, over the same batches at the
same batch size. Weights and tokens are random; every ratio is of one run on one device. A case that
stands in `--out` already is not measured again, so an interrupted plan goes on where it stopped. Each
case has its own limit, and one that fails says so and the next begins.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.common import json_lines
from benchmarks.speed.figure import PICTURE, picture
from benchmarks.speed.measure import measure
from benchmarks.speed.plans import big_plan, processor_plan, tiny_plan
from benchmarks.speed.tables import tables

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=("auto", "tiny"), default="auto")
    parser.add_argument("--only", nargs="+", default=[], help="names of cases, or how names begin")
    parser.add_argument("--out", type=Path, help="JSON lines, added to as it goes")
    parser.add_argument("--seconds", type=float, default=1e9, help="for all cases together")
    parser.add_argument("--table", type=Path, nargs="?", const=RESULTS, help="of recorded results")
    parser.add_argument(
        "--picture", type=Path, default=PICTURE, help="where the table's picture goes"
    )
    options = parser.parse_args(arguments)
    if options.table is not None:
        records = json_lines.read(options.table)
        print(tables(records))
        picture(records, options.picture)
        return 0
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    warnings.filterwarnings("ignore", category=UserWarning)
    device = torch.device(options.device)
    if options.shape == "tiny":
        cases = tiny_plan()
    else:
        cases = processor_plan() if device.type == "cpu" else big_plan()
    if options.only:
        names = {case.name for case in cases}
        exact = names & set(options.only)
        begin = tuple(set(options.only) - exact)
        cases = [c for c in cases if c.name in exact or (begin and c.name.startswith(begin))]
    records = measure(cases, device, options.out, options.seconds)
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
