"""Whose a safetensors file is: the format that its header names, and the index of shards beside it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lorainit.errors import StatisticsFileError

STATISTICS = "lorainit-statistics"
"""In the header of every file of statistics: what bears it is this package's own."""

INDEX = ".index.json"

_LARGEST_HEADER = 100_000_000
"""Bytes; what safetensors itself reads."""


def index_of(path: Path) -> Path:
    """Where the index of shards lies that are named after `path`."""
    return path.with_name(path.name + INDEX)


def is_there(path: Path) -> bool:
    """Whether there is a file of that name, or shards."""
    return path.is_file() or index_of(path).is_file()


def check_statistics_there(path: Path) -> None:
    """Raise StatisticsFileError where there is neither a file nor shards of that name."""
    if not is_there(path):
        raise no_statistics(path)


def no_statistics(path: Path, missing: str = "") -> StatisticsFileError:
    """The error where a file of statistics, or a part of it, is not there."""
    return StatisticsFileError(
        f"there is no statistics file '{path}'{missing}. 'lorainit collect' writes one."
    )


def check_target(path: Path, mark: str) -> None:
    """Refuse to write over what is not of this format: other files keep their place.

    Raises:
        FileExistsError: a file or an index of that name is somebody else's.
    """
    if path.exists() and (not path.is_file() or mark_of(path.resolve()) != mark):
        raise FileExistsError(
            f"'{path}' is there and holds something else, which is not written over. Choose another "
            "name"
        )
    index = index_of(path)
    if index.exists() and table_of(index)["metadata"].get("format") != mark:
        raise FileExistsError(
            f"'{index}' is there and is the index of other files, which are not written over. Choose "
            "another name"
        )
    longest = f"{path.stem}-{'0' * 16}-00000-of-00000{path.suffix}"
    if max(len(os.fsencode(longest)), len(os.fsencode(index.name))) > 255:
        raise OSError(f"the name '{path.name[:40]}...' is too long. Choose a shorter one")


def mark_of(path: Path) -> str | None:
    """The format that the header of a safetensors file names; None of any other file, or of a link."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(number, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if size <= _LARGEST_HEADER else b""
        found = json.loads(text)["__metadata__"]["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def table_of(index: Path) -> dict[str, Any]:
    """The metadata and the places that an index names; empty ones of what is no index."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
        metadata, places = table["metadata"], table["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        metadata = places = None
    if not isinstance(metadata, dict) or not isinstance(places, dict):
        return {"metadata": {}, "weight_map": {}}
    return {"metadata": metadata, "weight_map": places}


def is_shard(path: Path, name: object) -> bool:
    """Whether shards of `path` get such names."""
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    pattern = rf"{stem}-[0-9a-f]{{8,16}}-\d{{5}}-of-\d{{5}}{suffix}"
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None
