"""How long a start takes, beside its floor: one command, JSON lines as it goes.

    python -m benchmarks.speed --out speed.jsonl     the device's own plan: 7B on CUDA, 135M on a CPU
    python -m benchmarks.speed --shape tiny          every case on a CPU at tiny size, to see that it runs
    python -m benchmarks.speed --table speed.jsonl   tables, and docs/images/speed.png

The floor is one forward and backward with the gradients of all weights, over the same batches at the
same batch size. Weights and tokens are random; every ratio is of one run on one device. A case that
stands in `--out` already is not measured again, so an interrupted plan goes on where it stopped. Each
case has its own limit, and one that fails says so and the next begins.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import parts, peers, table
from benchmarks.timing.cases import Case, big_plan, processor_plan, tiny_plan
from benchmarks.timing.clock import Clock, cleared, limited, peak_gib, provenance, reset_peak
from benchmarks.timing.model import build
from benchmarks.timing.table import PICTURE

RESULTS = Path(__file__).parent / "results" / "speed.jsonl"

KINDS: dict[str, Callable[[Case, Any, Clock], dict[str, Any]]] = {
    "floor": parts.run_floor,
    "pass": parts.run_pass,
    "start": parts.run_start,
    "full": parts.run_full,
    "solve": parts.run_solve,
    "ranks": parts.run_ranks,
    "precision": parts.run_precision,
    "objective": parts.run_objective,
    "share": parts.run_share,
    "profile": parts.run_profile,
    "profile_floor": parts.run_profile_floor,
    "operations": parts.run_operations,
    "peft_lora_ga": peers.run_lora_ga,
    "peft_corda": peers.run_corda,
    "peft_eva": peers.run_eva,
}
WITHOUT_MODEL = {"solve", "operations"}
CHANGES_MODEL = {"peft_lora_ga", "peft_corda", "peft_eva"}


def measure(
    cases: list[Case], device: torch.device, out: Path | None, seconds: float
) -> list[dict[str, Any]]:
    """Run what is not recorded yet, within `seconds` altogether."""
    end = time.monotonic() + seconds
    records = read(out) if out is not None and out.exists() else []
    done = {record["name"] for record in records if "error" not in record}
    say({"name": "provenance", **provenance(device)}, records, out)
    model, built = None, None
    for case in cases:
        left = end - time.monotonic()
        if case.name in done:
            continue
        if left < 5:
            print(f"{case.name}: no time left", file=sys.stderr)
            break
        clock, record = Clock(device), asdict(case)
        begin = time.monotonic()
        try:
            case = capped(case, records)
            with limited(min(case.limit, int(left))):
                if case.kind not in WITHOUT_MODEL and built != case.sizes():
                    model = None
                    cleared()
                    model, built = build(case.sizes(), device), case.sizes()
                cleared()
                reset_peak(device)
                record |= KINDS[case.kind](case, model, clock)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
            # Printed, not recorded: it names the machine's own folders.
            traceback.print_exc()
            built = None
        if case.kind in CHANGES_MODEL:
            built = None
        record["seconds"] = clock.seconds
        record["all_seconds"] = time.monotonic() - begin
        record.setdefault("peak_gib", peak_gib(device))
        say(record, records, out)
        cleared()
    return records


def capped(case: Case, records: list[dict[str, Any]]) -> Case:
    """The case within the memory that another one took."""
    if not case.cap_of:
        return case
    for record in records:
        if record["name"] == case.cap_of and "error" not in record:
            peak = record.get("whole_peak_gib")
            return (
                case
                if peak is None
                else replace(case, options=case.options | {"max_memory": int(peak * 2**30)})
            )
    raise LookupError(f"'{case.cap_of}' was not measured")


def say(record: dict[str, Any], records: list[dict[str, Any]], out: Path | None) -> None:
    record = {k: v for k, v in record.items() if v not in ("", {}, None)}
    records.append(record)
    line = json.dumps(record)
    print(line[:2000], flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


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
        records = read(options.table)
        print(table.tables(records))
        table.picture(records, options.picture)
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
