"""The shell's words, read off the signatures and docstrings of the commands.

Nothing here imports torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from lorainit._version import __version__
from lorainit.cli.commands import COMMANDS
from lorainit.cli.options import Option, check_number

_DESCRIPTION = "Start a LoRA adapter where the target data says it should."

_EPILOG = """\
a first start:
  lorainit init --model ./model --data train.jsonl --method lora-da --output start

then train ./start with anything that trains a PEFT adapter, or:
  lorainit train --model ./model --data train.jsonl --adapter start --output trained

Every command has its own help with an example: lorainit init --help
"""

SHELL_ONLY = ("json", "debug", "config")
"""Options of every command that its function has not."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="lorainit", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"lorainit {__version__}")
    parser.set_defaults(command=None, json=False, quiet=False, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, function in COMMANDS.items():
        summary, description, example = _documentation(function)
        one = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=example,
            formatter_class=_Formatter,
        )
        _add_options(one, function)
    return parser


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the command's function is called with."""
    names = inspect.signature(COMMANDS[options.command]).parameters
    return {name: getattr(options, name) for name in names}


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line too; the many options are for ``--help``."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; the words are kept for what an error says of them."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say it and exit with 2; a mistyped option before the one that it leaves missing."""
        known = list(self._option_string_actions)
        for word in self._given:
            name = word.partition("=")[0]
            missing = "required" in message and name.startswith("--")
            if missing and not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                message = f"there is no option {name}{hint}"
                break
        self.exit(2, f"{self.prog}: error: {message}. See '{self.prog} --help'.\n")


def _documentation(function: Callable[..., Any]) -> tuple[str, str, str]:
    """First line, all that stands before the example, and the example as the shell shows it."""
    before, _, after = (inspect.getdoc(function) or "").partition("Example::")
    lines = ["example:"]
    for line in after.splitlines():
        if line.startswith("    "):
            lines.append(line[2:])
        elif line:
            lines.append(line.removesuffix(":"))
    return before.strip().splitlines()[0], before.strip(), "\n".join(lines)


def _add_options(parser: argparse.ArgumentParser, function: Callable[..., Any]) -> None:
    hints = typing.get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        option = next(m for m in hints[name].__metadata__ if isinstance(m, Option))
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        kind = hints[name].__origin__
        flag = "--" + name.replace("_", "-")
        groups[option.group].add_argument(flag, **_settings(kind, option, parameter))
    output = groups["output"]
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    output.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    output.add_argument("--config", metavar="FILE", help="YAML file of options, names as here")


def _settings(kind: Any, option: Option, parameter: inspect.Parameter) -> dict[str, Any]:
    """Keyword arguments of `add_argument`."""
    if kind is bool:
        return {"action": "store_true", "help": option.help}
    required = parameter.default is inspect.Parameter.empty
    found: dict[str, Any] = {"help": option.help, "required": required}
    if not required:
        found["default"] = parameter.default
    if option.metavar:
        found["metavar"] = option.metavar
    if typing.get_origin(kind) is Literal:
        return found | {"choices": typing.get_args(kind)}
    if option.many is not None:
        return found | {"type": _several(option)}
    plain = _plain(kind)
    if plain in (int, float):
        found.setdefault("metavar", "N")
    if plain is Mapping:
        return found | {"action": _NameValue}
    if plain in (int, float):
        return found | {"type": _number(plain, option)}
    return found | {"type": plain}


def _plain(kind: Any) -> Any:
    """The type of one value: ``int`` of ``int | None``, ``Mapping`` of ``Mapping[...] | None``."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _several(option: Option) -> Callable[[str], list[Any]]:
    kind = option.many
    assert kind is not None

    def values(text: str) -> list[Any]:
        one = _number(kind, option) if kind in (int, float) else kind
        try:
            return [one(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"write numbers with commas between them, not {text[:60]}"
            ) from None

    return values


def _number(kind: Callable[[str], float], option: Option) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {what}, got {text[:60]!r}") from None
        try:
            check_number(option, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    return number


class _NameValue(argparse.Action):
    """``--set a=1 --set b=2`` as ``{"a": "1", "b": "2"}``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, equals, value = str(values).partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"write NAME=VALUE, not {name}")
        before = getattr(namespace, self.dest) or {}
        setattr(namespace, self.dest, before | {name.strip().replace("-", "_"): value.strip()})


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, defaults shown."""

    def __init__(self, prog: str, **settings: object) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        silent = default is None or default is False or default in (argparse.SUPPRESS, ())
        if not text or silent or "default" in text:
            return text
        if isinstance(default, tuple):
            return f"{text} (default: {','.join(map(str, default))})"
        return text + " (default: %(default)s)"


# --- options in a file ------------------------------------------------------------------------


def with_file(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of ``--config FILE`` (YAML, same names) put before them.

    Raises:
        ValueError: the file cannot be read, holds no table of options, or one that the command has
            not.
    """
    arguments = list(arguments)
    place = next((i for i, a in enumerate(arguments) if a.split("=")[0] == "--config"), None)
    if place is None or arguments[0] not in COMMANDS:
        return arguments
    joined = "=" in arguments[place]
    if not joined and place + 1 >= len(arguments):
        return arguments
    name = arguments[place].partition("=")[2] if joined else arguments[place + 1]
    rest = arguments[1:place] + arguments[place + (1 if joined else 2) :]
    return [arguments[0], *_from_yaml(Path(name), arguments[0]), *rest]


def _from_yaml(path: Path, command: str) -> list[str]:
    table = _table_of(path)
    known = inspect.signature(COMMANDS[command]).parameters
    found: list[str] = []
    for key, value in table.items():
        name = str(key).replace("-", "_")
        if name not in known and name not in SHELL_ONLY:
            raise ValueError(
                f"'{path}': 'lorainit {command}' has no option '{str(key)[:60]}'. It has: "
                f"{', '.join(known)}."
            )
        option = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            found.append(option)
        elif isinstance(value, dict):
            for part, setting in value.items():
                found += [option, f"{part}={_text(path, key, setting)}"]
        else:
            # A value that begins with a dash would be taken for an option.
            items = value if isinstance(value, list) else [value]
            found.append(f"{option}={','.join(_text(path, key, item) for item in items)}")
    return found


def _table_of(path: Path) -> dict[Any, Any]:
    """What a YAML file holds."""
    import yaml

    try:
        # A byte-order mark is no part of the text.
        table = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path} cannot be read ({getattr(error, 'strerror', error)}). Give a YAML file "
            "of options."
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # Its constructors raise what Python raises of dates, numbers and keys that are none.
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"'{path}' is no YAML: {said}") from None
    if not isinstance(table, dict):
        raise ValueError(f"'{path}' must hold a table of options, such as 'rank: 16'.")
    return table


def _text(path: Path, key: object, value: object) -> str:
    """One value as the shell would have it."""
    if isinstance(value, dict | list | set | bytes):
        raise ValueError(
            f"'{path}': the value of '{str(key)[:60]}' is nested too deeply. Write one value, or a list of "
            "values."
        )
    try:
        return str(value)
    except ValueError:
        raise ValueError(f"'{path}': the value of '{str(key)[:60]}' is no usable number.") from None
