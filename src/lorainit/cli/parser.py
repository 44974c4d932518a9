"""The words of the command line: options, help, and a complete example for every command.

Nothing here imports torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorainit._version import __version__

_DESCRIPTION = "Start a LoRA adapter where the target data says it should."

_EPILOG = """\
a first start:
  lorainit init --model ./model --data train.jsonl --method lora-da --output start

then train ./start with anything that trains a PEFT adapter, or:
  lorainit train --model ./model --data train.jsonl --adapter start --output trained

Every command has its own help with an example: lorainit init --help
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="lorainit", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Formatter
    )
    parser.add_argument("--version", action="version", version=f"lorainit {__version__}")
    parser.set_defaults(command=None, json=False, quiet=False, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _methods(commands)
    _collect(commands)
    _init(commands)
    _train(commands)
    _compare(commands)
    _report(commands)
    _export(commands)
    return parser


def with_file(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of ``--config FILE`` (YAML, same names) put before them.

    Raises:
        ValueError: the file holds no table of options.
        OSError: it cannot be read.
    """
    arguments = list(arguments)
    place = next((i for i, a in enumerate(arguments) if a.split("=")[0] == "--config"), None)
    if place is None or not arguments or arguments[0].startswith("-"):
        return arguments
    joined = "=" in arguments[place]
    if not joined and place + 1 >= len(arguments):
        return arguments
    name = arguments[place].partition("=")[2] if joined else arguments[place + 1]
    rest = arguments[1:place] + arguments[place + (1 if joined else 2) :]
    return [arguments[0], *_from_yaml(Path(name)), *rest]


def _from_yaml(path: Path) -> list[str]:
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is no YAML: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"'{path}' must hold a table of options, such as 'rank: 16'.")
    found: list[str] = []
    for key, value in table.items():
        option = "--" + str(key).replace("_", "-")
        if isinstance(value, bool):
            found += [option] if value else []
        elif isinstance(value, dict):
            for name, setting in value.items():
                found += [option, f"{name}={setting}"]
        elif isinstance(value, list):
            found += [option, ",".join(map(str, value))]
        else:
            found += [option, str(value)]
    return found


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, defaults shown."""

    def __init__(self, prog: str, **settings: object) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        text = action.help
        if text and default not in (None, False, argparse.SUPPRESS) and "default" not in text:
            text += " (default: %(default)s)"
        return text


_Commands = argparse._SubParsersAction  # the type has no public name


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, module: str, text: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, epilog=f"example:\n{example}", formatter_class=_Formatter
    )
    parser.set_defaults(module=module)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    output.add_argument("--quiet", action="store_true", help="no progress bars, no summary")
    output.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    output.add_argument("--config", metavar="FILE", help="YAML file of options, names as here")
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="folder of a causal language model, or its name on the hub"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="to load it in; auto: as it was saved",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: the best")


def _data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        metavar="FILE",
        help="JSON lines with prompt and completion, or messages, or text",
    )
    group.add_argument("--max-length", type=_positive, default=1024, help="tokens a sequence")
    group.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch")
    group.add_argument("--seed", type=int, default=0, help="of the order in which data is taken")


def _sample(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("statistics")
    group.add_argument(
        "--max-sequences", type=_positive, default=256, help="at most so many of the data"
    )
    group.add_argument(
        "--token-mask",
        choices=("attention", "labels"),
        default="attention",
        help="positions that count in the second moments",
    )
    group.add_argument(
        "--loss-reduction",
        choices=("sequence", "token"),
        default="sequence",
        help="each sequence's loss a mean over its label tokens, or a sum",
    )


def _adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapter")
    group.add_argument("--rank", type=_positive, default=16, help="r")
    group.add_argument("--alpha", type=float, help="lora_alpha (default: the rank)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    group.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    group.add_argument(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="q_proj,v_proj or a regular expression or all-linear",
    )


def _method(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method", default=default, help="one of those that 'lorainit methods' lists"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method, such as damping=0.01; may be given again",
    )
    group.add_argument("--paper", action="store_true", help="the settings its authors published")


def _dry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan (layers, memory, passes) and stop"
    )


def _methods(commands: _Commands[argparse.ArgumentParser]) -> None:
    _command(
        commands,
        "methods",
        "listing",
        "List the methods: what each reads, whether the model's outputs are kept, its settings.",
        "  lorainit methods",
    )


def _collect(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "collect",
        "starting",
        "Collect statistics into a file, once, for any number of starts.",
        "  lorainit collect --model ./model --data train.jsonl --method natural,eva \\\n"
        "      --output target.safetensors",
    )
    _model(parser)
    _data(parser)
    parser.add_argument(
        "--method",
        default="natural,eva",
        metavar="NAMES",
        help="collect what these read; natural,eva is all there is (default: %(default)s)",
    )
    parser.add_argument(
        "--target-modules", default="all-linear", metavar="NAMES", help="layers to watch"
    )
    _sample(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file")
    _dry(parser)


def _init(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "init",
        "starting",
        "Start an adapter, and save it as an ordinary PEFT folder.",
        "  lorainit init --model ./model --data train.jsonl --method lora-da \\\n"
        "      --rank 16 --rslora --output start\n"
        "from statistics collected before, with the data only to measure the step's length:\n"
        "  lorainit init --model ./model --statistics target.safetensors --data train.jsonl \\\n"
        "      --method natural --output start",
    )
    _model(parser)
    _data(parser, required=False)
    _method(parser, "lora-da")
    _adapter(parser)
    _sample(parser)
    parser.add_argument("--statistics", metavar="FILE", help="what 'lorainit collect' wrote")
    parser.add_argument(
        "--cap-rank", action="store_true", help="lower the rank of layers too small for it"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the adapter")
    _dry(parser)


def _train(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "train",
        "training",
        "Train an adapter with TRL's SFTTrainer (needs the extra 'train').",
        "  lorainit train --model ./model --data train.jsonl --adapter start \\\n"
        "      --learning-rate 2e-4 --epochs 1 --output trained\n"
        "start and train in one go:\n"
        "  lorainit train --model ./model --data train.jsonl --method lora-da --output trained",
    )
    _model(parser)
    _data(parser)
    parser.add_argument("--adapter", metavar="FOLDER", help="what 'lorainit init' wrote")
    _method(parser)
    _adapter(parser)
    _sample(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--learning-rate", type=float, default=2e-4, help="at its highest")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data")
    group.add_argument("--max-steps", type=int, default=-1, help="stop after so many; -1: no limit")
    group.add_argument("--warmup-ratio", type=float, default=0.03, help="share of the steps")
    group.add_argument("--logging-steps", type=_positive, default=10, help="between two records")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the trained adapter")


def _compare(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "compare",
        "comparing",
        "Train a few steps from several starts, each at its best learning rate, and tabulate.",
        "  lorainit compare --model ./model --data train.jsonl \\\n"
        "      --methods vanilla,lora-da,natural --learning-rates 1e-4,3e-4,1e-3 --steps 100",
    )
    _model(parser)
    _data(parser)
    parser.add_argument("--methods", default="vanilla,lora-da,natural", help="with commas")
    parser.add_argument("--learning-rates", default="1e-4,3e-4,1e-3", help="with commas")
    parser.add_argument("--steps", type=_positive, default=100, help="of training, each run")
    parser.add_argument(
        "--held-out", type=_positive, default=64, help="records kept from training, to measure on"
    )
    _adapter(parser)
    _sample(parser)


def _report(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "report",
        "reporting",
        "Write one HTML page: what the data asks of each layer, and what a rank keeps of it.",
        "  lorainit report --model ./model --statistics target.safetensors \\\n"
        "      --adapter start --rank 16 --output report.html",
    )
    _model(parser)
    parser.add_argument("--statistics", required=True, metavar="FILE", help="collected before")
    parser.add_argument("--adapter", metavar="FOLDER", help="a start, to show its size")
    parser.add_argument(
        "--methods",
        default="lora-da,natural,lora-one,eva,pissa",
        help="whose subspaces are compared",
    )
    _adapter(parser)
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page")


def _export(commands: _Commands[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands,
        "export",
        "exporting",
        "Write an adapter for servers: one rank, one scaling, nothing else to know.",
        "  lorainit export --model ./model --adapter trained --output served --rank 16",
    )
    _model(parser)
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="the adapter to write")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--rank", type=_positive, help="cut to this rank, and report the error")
    parser.add_argument("--max-rank", type=_positive, help="the server's limit (vLLM: 16)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
