"""Cases one by one, each recorded as it ends; what is recorded is not measured again."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import json_lines
from benchmarks.common.clock import Clock, cleared, limited, peak_gib, reset_peak
from benchmarks.common.decoder import Case, build
from benchmarks.common.provenance import provenance
from benchmarks.speed.accuracy import run_objective, run_precision
from benchmarks.speed.operations import run_operations
from benchmarks.speed.peft_starts import run_corda, run_eva, run_lora_ga
from benchmarks.speed.profiles import run_profile, run_profile_floor
from benchmarks.speed.quantized_starts import run_quantized_start
from benchmarks.speed.solves import run_ranks, run_solve
from benchmarks.speed.starts import run_budget, run_floor, run_full, run_pass, run_start
from benchmarks.speed.training import run_share

KINDS: dict[str, Callable[[Case, Any, Clock], dict[str, Any]]] = {
    "floor": run_floor,
    "pass": run_pass,
    "start": run_start,
    "full": run_full,
    "budget": run_budget,
    "quantized_start": run_quantized_start,
    "solve": run_solve,
    "ranks": run_ranks,
    "precision": run_precision,
    "objective": run_objective,
    "share": run_share,
    "profile": run_profile,
    "profile_floor": run_profile_floor,
    "operations": run_operations,
    "peft_lora_ga": run_lora_ga,
    "peft_corda": run_corda,
    "peft_eva": run_eva,
}

WITHOUT_MODEL = {"solve", "operations"}

CHANGES_MODEL = {"peft_lora_ga", "peft_corda", "peft_eva", "quantized_start"}


def measure(
    cases: list[Case], device: torch.device, out: Path | None, seconds: float
) -> list[dict[str, Any]]:
    """Run what is not recorded yet, within `seconds` altogether."""
    end = time.monotonic() + seconds
    records = json_lines.read(out) if out is not None and out.exists() else []
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
        if case.kind in CHANGES_MODEL or case.offloaded:
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
    json_lines.say(record, out)
