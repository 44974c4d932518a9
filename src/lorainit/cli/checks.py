"""What can be said of a command's options without torch, PEFT and transformers, whose import takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from lorainit.adapters.config_file import check_config_file, check_weights_file
from lorainit.cli.options import Option, check_number
from lorainit.cli.outputs import (
    check_file,
    check_folder,
    check_statistics_file,
    is_comparison,
    is_page,
)
from lorainit.cli.report_sources import find_statistics
from lorainit.errors import AdapterError, DataError, MissingExtraError
from lorainit.files.marked import check_statistics_there
from lorainit.files.names import is_data_set
from lorainit.models.place import check_place


def check_numbers(function: Callable[..., Any], values: dict[str, Any]) -> None:
    """Raise ValueError for a number that is none, or out of its range, and names its option."""
    hints = get_type_hints(function, include_extras=True)
    for name, value in values.items():
        option = next(m for m in hints[name].__metadata__ if isinstance(m, Option))
        many = option.many in (int, float) and not isinstance(value, str)
        for number in value if many else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                try:
                    check_number(option, number)
                except ValueError as error:
                    raise ValueError(f"--{name.replace('_', '-')} {error}") from None


def check_places(options: argparse.Namespace) -> None:
    """Options that go together, and what they name: there, or free to be written.

    Raises:
        LorainitError, OSError, ValueError: one line, with the remedy.
    """
    given = vars(options).get
    _check_together(options)
    if given("model"):
        check_place(options.model)
    if given("data"):
        is_data_set(options.data)
    reference = given("reference")
    if reference and not Path(reference).exists():
        raise AdapterError(
            f"--reference: '{reference}' is no folder and no file. Give the checkpoint on this disk; "
            "huggingface_hub.snapshot_download fetches one from the hub."
        )
    if given("output") and not given("dry_run"):
        _check_output(options)
    if options.command == "report":
        find_statistics(options)
    elif given("statistics"):
        check_statistics_there(Path(options.statistics))
    if given("adapter"):
        check_config_file(Path(options.adapter))
        check_weights_file(Path(options.adapter))
    for text in given("curves") or ():
        path = named_path(text)[0]
        if not Path(path).exists():
            raise DataError(
                f"--curves: there is nothing at '{path}'. Give a Trainer's folder, or what "
                "'lorainit compare --output' wrote."
            )


def named_path(text: str) -> tuple[str, str | None]:
    """Path and name of ``PATH`` or ``NAME=PATH``."""
    name, equals, path = text.partition("=")
    return (path, name) if equals else (text, None)


def _check_together(options: argparse.Namespace) -> None:
    if options.command == "train":
        missing = [n for n in ("trl", "datasets") if importlib.util.find_spec(n) is None]
        if missing:
            raise MissingExtraError(
                f"'lorainit train' needs {missing[0]}: install it with pip install 'lorainit[train]'"
            )
        if bool(options.adapter) == bool(options.method):
            raise ValueError(
                "give --adapter, a start made before, or --method, to make one; not both."
            )
    if options.command == "report" and options.data and options.statistics and not options.adapter:
        raise ValueError(
            "--data beside --statistics is there to measure an adapter's loss on: give --adapter too."
        )
    if options.command == "init" and options.learning_rate is not None and not options.data:
        raise ValueError(
            "--learning-rate is matched by measuring the start's own rate on records: give --data too."
        )
    if options.command == "compare" and not options.learning_rates:
        raise ValueError("--learning-rates: write positive numbers with commas, 1e-4,3e-4.")


def _check_output(options: argparse.Namespace) -> None:
    if options.command == "collect":
        check_statistics_file(options.output)
    elif options.command == "compare":
        check_file(options.output, is_comparison)
    elif options.command == "report":
        check_file(options.output, is_page)
    else:
        check_folder(options.output, options.model)
