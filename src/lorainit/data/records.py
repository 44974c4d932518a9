"""Records: lines of a JSON file, or the rows of a data set on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lorainit.errors import DataError, MissingExtraError, first_line
from lorainit.files.names import is_data_set


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a file of JSON lines (empty lines are passed over), or of a data set by name.

    Args:
        path: of a file; or ``OWNER/NAME`` or ``OWNER/NAME:SPLIT`` on the Hugging Face hub (the split
            is ``train`` unless said), which the package ``datasets`` loads.

    Raises:
        DataError: no such file or data set, no records, or a line that is no JSON object.
        MissingExtraError: a name is given, and ``datasets`` is not installed.
    """
    if is_data_set(path):
        return _from_hub(str(path))
    path = Path(path)
    records = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(_record(line, path, number))
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is no UTF-8 text ({error}). Give a file of JSON lines."
        ) from None
    if not records:
        raise DataError(f"'{path}' holds no records. Give a file of JSON lines.")
    return records


def _from_hub(name: str) -> list[dict[str, Any]]:
    place, _, split = name.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(
            f"there is no data file '{name}', and to read a data set of that name from the hub the "
            "package 'datasets' is needed: install it with pip install 'lorainit[train]'"
        ) from error
    try:
        found = [dict(record) for record in load_dataset(place, split=split or "train")]
    except Exception as error:  # whatever the hub, the network or the files' readers raise
        raise DataError(
            f"there is no data file '{name}', and the hub gave no data set of that name ({first_line(error)}). "
            "Look at the name, the split and the network, or give a file of JSON lines."
        ) from error
    if not found:
        raise DataError(f"the data set '{name}' holds no records. Give another split.")
    return found


def _record(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        # A lone half of a surrogate pair is no character, and no tokenizer takes it.
        if "\\ud" in line.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"'{path}', line {number}, holds a lone surrogate, which is no character. Write the text in "
            "UTF-8."
        ) from None
    except RecursionError:
        raise DataError(
            f"'{path}', line {number}, is nested too deeply. Write one flat JSON object a line."
        ) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        raise DataError(
            f"'{path}', line {number}, is no JSON ({where}). Write one JSON object a line."
        ) from None
    except ValueError as error:
        raise DataError(
            f"'{path}', line {number}, is no JSON ({str(error)[:80]}). Write one JSON object a line."
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            f"'{path}', line {number}, is a {type(record).__name__}. Write one JSON object a line."
        )
    return record
