"""The kept lines, and what is found in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import json_lines

Records = Sequence[dict[str, Any]]


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """All launches' lines, the one-process launch first."""
    return [line for path in sorted(folder.glob("*.jsonl")) for line in json_lines.read(path)]


def find(
    records: Records, processes: int, kind: str, sequences: int = 0, batch: int = 8
) -> dict[str, Any]:
    """The one record of this case; of no number of sequences in particular: that with a start."""
    for record in records:
        if (
            (record.get("processes"), record.get("kind")) == (processes, kind)
            and (record["sequences"] == sequences if sequences else record["start"])
            and record["batch"] == batch
        ):
            return record
    raise KeyError(f"no record of {kind} on {processes} processes, {sequences} sequences")


def seconds_of_pass(record: dict[str, Any]) -> float:
    return min(record["seconds"]["pass 1"], record["seconds"]["pass 2"])
