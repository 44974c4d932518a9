"""Records as lines of JSON, shown and kept as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHOWN = 2000
"""Characters of a line that are printed."""


def say(record: dict[str, Any], out: Path | None) -> None:
    """Print a record, and add it to a file if there is one."""
    print(json.dumps(record)[:SHOWN], flush=True)
    if out is not None:
        add(record, out)


def add(record: dict[str, Any], out: Path) -> None:
    """Add a record to a file."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of a file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
