"""Results as JSON lines, one a run, named by their experiment; failures in a file of their own.

A run appends to ``records.jsonl`` and ``failures.jsonl`` of its output folder, so that a call that
is stopped loses nothing. ``python -m benchmarks.quality.merge`` adds them to the kept records, one
sorted file a stage and model.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lorainit
from benchmarks.quality.experiment import Experiment

RESULTS = Path(__file__).resolve().parent / "results"
"""The kept records, and the tables and figures of them."""

Record = dict[str, Any]

FIRST_EDITION = frozenset({"search", "seeds", "sweep"})
"""Stages whose runs serve each other: a sweep's value that is the standard one is a run of ``seeds``."""


def read_records(folders: Iterable[Path], name: str = "records") -> dict[str, Record]:
    """Every record below the folders, by id: lines of ``{name}.jsonl`` and of ``{name}/*.jsonl``.

    An experiment that two stages have run has two records; the second key says its stage, too.
    """
    found: dict[str, Record] = {}
    for folder in folders:
        for path in sorted([*folder.rglob(f"{name}.jsonl"), *folder.rglob(f"{name}/*.jsonl")]):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a call that was stopped in the middle of it
                key = record["id"]
                if key in found and found[key].get("stage") != record.get("stage"):
                    key = f"{key} {record['stage']}"
                found[key] = record
    return found


def done_in(records: Iterable[Record], stage: str) -> set[str]:
    """Ids of the experiments that need not run again in a stage: other stages' runs may be of older code."""
    stages = FIRST_EDITION if stage in FIRST_EDITION else {stage}
    return {record["id"] for record in records if record["stage"] in stages}


def append(folder: Path, record: Record, name: str = "records") -> None:
    """One line more in ``folder/{name}.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(_line(record))


def keep(folder: Path, records: Iterable[Record]) -> None:
    """Records into ``folder/records/{stage}-{model}.jsonl``, sorted; of one stage and id the new one stays.

    The training loss of every step, a third of a record, is in no table and is left out.
    """
    every = [*read_records([folder]).values(), *records]
    known = {
        (r["stage"], r["id"]): {k: v for k, v in r.items() if k != "train_loss"} for r in every
    }
    by_file: dict[str, list[Record]] = defaultdict(list)
    for record in known.values():
        by_file[f"{record['stage']}-{record['experiment']['model']}.jsonl"].append(record)
    for name, members in by_file.items():
        target = folder / "records" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=target.parent, suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in sorted(members, key=_order))
        os.replace(scratch, target)


def _order(record: Record) -> tuple[Any, ...]:
    experiment = record["experiment"]
    budgets = (record["rank"], experiment["train_samples"], experiment["statistics_samples"])
    return (
        record["task"],
        record["label"],
        *budgets,
        record["learning_rate"],
        record["seed"],
        record["id"],
    )


def _line(record: Record) -> str:
    return json.dumps(clean(record), sort_keys=True, separators=(",", ":")) + "\n"


def clean(value: Any) -> Any:
    """JSON without NaN, floats with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value


def head(experiment: Experiment, stage: str) -> Record:
    """The part of a record that is known before it runs."""
    return {
        "id": experiment.id,
        "stage": stage,
        "task": experiment.task,
        "method": experiment.method,
        "label": experiment.label,
        "seed": experiment.seed,
        "learning_rate": experiment.learning_rate,
        "rank": experiment.rank,
        "experiment": experiment.to_json(),
    }


def provenance(commit: str | None, device: torch.device) -> Record:
    """Versions, commit and device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit or _commit(),
        "device": name,
        "versions": {
            "lorainit": lorainit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
