"""Parse, run one command, print its result; errors are one line with the remedy.

Exit codes: 0 done, 1 bad input (the message says what to do), 2 wrong usage, 3 a missing extra,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lorainit.cli.parser import build_parser, with_file

BAD_INPUT, MISSING_EXTRA, INTERRUPTED = 1, 3, 130


class MissingExtraError(Exception):
    """A command needs packages that are not among the required ones."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = with_file(arguments)
    except (OSError, ValueError) as error:
        return _failed(parser.prog, error, BAD_INPUT)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        module = _quiet_import(f"lorainit.cli.{options.module}")
        result, text = module.run(options)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except MissingExtraError as error:
        return _failed(parser.prog, error, MISSING_EXTRA)
    except Exception as error:
        if options.debug or not _is_known(error):
            raise
        return _failed(parser.prog, error, BAD_INPUT)
    _show(options, result, text)
    return 0


def _quiet_import(name: str) -> Any:
    """Optional libraries that torch finds installed may complain about themselves; not here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(before)


def _is_known(error: Exception) -> bool:
    """Whether the message is meant for the user: anything else is a bug and keeps its traceback."""
    from lorainit.errors import LorainitError

    return isinstance(error, LorainitError | OSError | ValueError | ImportError | MemoryError) or (
        type(error).__name__ == "OutOfMemoryError"
    )


def _failed(program: str, error: Exception, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"{program}: error: {text}", file=sys.stderr)
    return code


def _show(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    if options.json:
        print(json.dumps(result, indent=2, default=str))
    elif not options.quiet and text:
        print(text)
