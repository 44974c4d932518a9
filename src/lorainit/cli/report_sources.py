"""Where ``lorainit report`` has its statistics from: a file of them, or records to take them of."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorainit.adapters.serving import SIDE_FILE
from lorainit.errors import MissingStatisticError
from lorainit.files.marked import check_statistics_there, is_there


def find_statistics(options: argparse.Namespace) -> None:
    """Fill in ``statistics``, a file, or else ``records``, a file to take them of, where there is one.

    What is given comes first, then what ``lorainit.json`` says that the adapter was started from. An
    adapter may do without: the page has what its record says.

    Raises:
        MissingStatisticError, StatisticsFileError: there is nothing to make a page from.
    """
    options.records = None
    if options.statistics:
        check_statistics_there(Path(options.statistics))
        return
    origin = _record(options.adapter)
    named, records = origin.get("statistics"), origin.get("data")
    if isinstance(named, str) and is_there(Path(named)):
        options.statistics = named
    elif options.data:
        options.records = options.data
    elif isinstance(records, str) and Path(records).is_file():
        options.records = records
    elif options.adapter is None:
        raise MissingStatisticError(
            "give --adapter, which 'lorainit init' writes, --data, to take statistics of, or --statistics, "
            "which 'lorainit collect' writes."
        )
    elif options.reference:
        raise MissingStatisticError(
            "--reference: what quantization took is measured on data. Give --data, or --statistics from "
            "'lorainit collect'."
        )


def same_file(first: str | None, second: str | None) -> bool:
    """Whether both are there and one file."""
    return bool(first and second and Path(first).is_file() and Path(second).is_file()) and Path(
        str(first)
    ).samefile(str(second))


def _record(adapter: str | None) -> Mapping[str, Any]:
    """What the side file of an adapter says; nothing where it cannot be read."""
    if adapter is not None:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads((Path(adapter) / SIDE_FILE).read_text("utf-8"))
            if isinstance(found, dict):
                return found
    return {}
