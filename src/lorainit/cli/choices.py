"""The method, its settings, the device and the memory that options name: looked at before PEFT is imported."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Sequence
from typing import Any

from lorainit.cli.loading import device_of
from lorainit.errors import MissingStatisticError
from lorainit.methods import METHODS
from lorainit.types import Method, ReadsReference
from lorainit.types.byte_size import parse_bytes


def check_choices(options: argparse.Namespace) -> None:
    """Raise where an option names what is not there, or lacks what goes with it.

    Raises:
        MissingStatisticError, ValueError: one line, with the remedy.
    """
    if options.command in ("compare", "report"):
        known_methods(options.methods)
    elif options.command == "collect":
        if not needs_of(options.method):
            raise ValueError(
                f"--method {','.join(options.method)} reads no statistics: there is nothing to do."
            )
    elif getattr(options, "method", None):
        method = method_of(options)
        if options.command == "init" and not options.dry_run:
            _check_inputs(options, method)
    if hasattr(options, "device"):
        device_of(options)
    parse_bytes(getattr(options, "max_memory", None))


def _check_inputs(options: argparse.Namespace, method: Method) -> None:
    if method.needs and not (options.data or options.statistics):
        raise MissingStatisticError(
            f"{options.method} reads {', '.join(sorted(method.needs))}: give --data, or "
            "--statistics from 'lorainit collect'."
        )
    if isinstance(method, ReadsReference) and method.needs_reference and not options.reference:
        raise MissingStatisticError(
            f"{options.method} needs the weights that the base was quantized from: give --reference, the "
            "folder of the full-precision checkpoint."
        )


def needs_of(names: Sequence[str]) -> frozenset[str]:
    """Statistics that any of these methods reads."""
    return frozenset().union(*(class_of(name)().needs for name in known_methods(names)))


def known_methods(names: Sequence[str]) -> list[str]:
    """The names of methods, each known, at least one.

    Raises:
        ValueError: there is no method of that name.
    """
    for name in names or [""]:
        class_of(name)
    return list(names)


def class_of(name: str) -> Any:
    """The class of a method by its name."""
    if name not in METHODS:
        raise ValueError(f"there is no method '{name}'. There are: {', '.join(METHODS)}.")
    return METHODS[name]


def method_of(options: argparse.Namespace) -> Method:
    """The method, with the settings given."""
    kind = class_of(options.method)
    base = kind.paper() if options.paper else kind()
    known = {field.name for field in dataclasses.fields(kind)}
    changes: dict[str, object] = {}
    for name, value in (options.set or {}).items():
        if name not in known:
            there = ", ".join(field.name for field in dataclasses.fields(kind)) or "none"
            raise ValueError(
                f"--set {name}={value}: {options.method} has no setting '{name}'; there are: {there}."
            )
        changes[name] = _value(value) if isinstance(value, str) else value
    method: Method = dataclasses.replace(base, **changes)
    return method


def _value(text: str) -> object:
    lowered = {"true": True, "false": False, "none": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # What is no literal, or nested too deeply for the parser, is a text.
        return text
