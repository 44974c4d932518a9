"""Parse, run one command, print its result; errors are one line with the remedy.

Exit codes: 0 done, 1 bad input (the message says what to do), 2 wrong usage, 3 a missing extra,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence

from lorainit.cli.commands import COMMANDS, Outcome
from lorainit.cli.parser import arguments_of, build_parser, with_file
from lorainit.errors import MissingExtraError

BAD_INPUT, MISSING_EXTRA, INTERRUPTED = 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = with_file(arguments)
    except ValueError as error:
        return _failed(parser.prog, error, BAD_INPUT)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    given = arguments_of(options)
    given["quiet"] = options.quiet or options.json
    try:
        outcome = COMMANDS[options.command](**given)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing half-written is left", file=sys.stderr)
        return INTERRUPTED
    except MissingExtraError as error:
        return _failed(parser.prog, error, MISSING_EXTRA)
    except Exception as error:
        if options.debug or not _is_known(error):
            raise
        return _failed(parser.prog, error, BAD_INPUT)
    _show(options, outcome)
    return 0


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


def _show(options: argparse.Namespace, outcome: Outcome) -> None:
    text = "" if options.quiet else outcome.text
    if options.json:
        text = json.dumps(outcome.values, indent=2, default=str)
    if not text:
        return
    try:
        encoding = sys.stdout.encoding or "utf-8"
        # A name that the terminal cannot show is shown by its numbers.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError):
        # Nobody reads it any more; what was asked for is done.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
