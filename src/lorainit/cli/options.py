"""The options that commands share: each one's type, help and place, written once.

A command is a function; its signature is made of these, and the shell and YAML are read by it.
Nothing here imports torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Option:
    """How the shell shows one parameter of a command.

    Attributes:
        help: what it means.
        group: of the help under which it stands.
        metavar: word for its value.
        least: whole numbers below this are refused.
        above: numbers that are not greater are refused.
        below: numbers that are not smaller are refused.
        many: type of one value, where commas separate several.
    """

    help: str
    group: str = "options"
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    below: float | None = None
    many: type | None = None


def check_number(option: Option, value: float) -> None:
    """Raise ValueError unless a number is finite and in the option's range."""
    try:
        good = math.isfinite(value)
    except OverflowError:
        good = False
    bounds = []
    if option.least is not None:
        good = good and value >= option.least
        bounds.append(f"at least {option.least:g}")
    if option.above is not None:
        good = good and value > option.above
        bounds.append(f"above {option.above:g}")
    if option.below is not None:
        good = good and value < option.below
        bounds.append(f"below {option.below:g}")
    if not good:
        wanted = " and ".join(bounds) or "a finite number"
        raise ValueError(f"must be {wanted}, got {str(value)[:40]}")


def _count(text: str, group: str, metavar: str | None = None) -> Option:
    return Option(text, group, metavar, least=1)


# --- model, data, output ----------------------------------------------------------------------

Model = Annotated[str, Option("folder of a causal language model, or its name on the hub", "model")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option("to load it in; auto: as it was saved", "model"),
]
Device = Annotated[str, Option("cpu, cuda, cuda:1, mps; auto: the best", "model")]
TrustRemoteCode = Annotated[
    bool, Option("run the Python code that comes with the model; otherwise never", "model")
]

_DATA = Option(
    "JSON lines with prompt and completion, or messages, or text; or a data set's name on the hub, "
    "NAME or NAME:SPLIT (extra 'train')",
    "data",
    "FILE",
)
Data = Annotated[str, _DATA]
OptionalData = Annotated[str | None, _DATA]
MaxLength = Annotated[int, _count("tokens a sequence", "data")]
BatchSize = Annotated[int, _count("sequences a batch", "data")]
Seed = Annotated[
    int, Option("of the order in which data is taken", "data", least=-(2**31), below=2**32)
]

MaxSequences = Annotated[int, _count("at most so many of the data", "statistics")]
TokenMask = Annotated[
    Literal["attention", "labels"],
    Option("positions that count in the second moments", "statistics"),
]
LossReduction = Annotated[
    Literal["sequence", "token"],
    Option("each sequence's loss a mean over its label tokens, or a sum", "statistics"),
]
GradientDtype = Annotated[
    Literal["float32", "bfloat16"],
    Option(
        "what gradients are added up in; bfloat16 takes half the memory, for LoRA-GA and LoRA-One",
        "statistics",
    ),
]
MaxMemory = Annotated[
    str | None,
    Option(
        "what model, statistics and a batch may take together, such as 24GiB; statistics are "
        "collected in more passes where it asks for that",
        "statistics",
        "SIZE",
    ),
]
StatisticsOfStart = Annotated[
    str | None,
    Option(
        "what 'lorainit collect' wrote; default: the file that --adapter was started from, or statistics "
        "taken of --data, or else of the records that it was started from",
        "statistics",
        metavar="FILE",
    ),
]
OptionalStatistics = Annotated[
    str | None, Option("what 'lorainit collect' wrote", "statistics", metavar="FILE")
]
Reference = Annotated[
    str | None,
    Option(
        "full-precision checkpoint that a quantized model was made from: for methods that give back what "
        "quantization took, and for the report to show it",
        "model",
        "FOLDER",
    ),
]

# --- adapter and method -----------------------------------------------------------------------

Rank = Annotated[int, _count("r", "adapter")]
Alpha = Annotated[float | None, Option("lora_alpha (default: the rank)", "adapter", above=0)]
RsLora = Annotated[bool, Option("scale by alpha / sqrt(r)", "adapter")]
Dropout = Annotated[float, Option("lora_dropout", "adapter", least=0, below=1)]
TargetModules = Annotated[
    str | Sequence[str],
    Option("q_proj,v_proj or a regular expression or all-linear", "adapter", "NAMES"),
]
CapRank = Annotated[
    bool,
    Option("lower the rank of layers too small for it, which are filled up otherwise", "adapter"),
]

MatchedRate = Annotated[
    float | None,
    Option(
        "that it will be trained at: factors and lora_alpha are resized so that it suits the start; "
        "default: none, and one is suggested",
        "adapter",
        above=0,
    ),
]
LearningRate = Annotated[
    float | None,
    Option(
        "at its highest; default: the one that was measured for the start, see 'lorainit init'",
        "training",
        above=0,
    ),
]

_METHOD = Option("one of those that 'lorainit methods' lists", "method")
Method = Annotated[str, _METHOD]
OptionalMethod = Annotated[str | None, _METHOD]
Settings = Annotated[
    Mapping[str, object] | None,
    Option(
        "a setting of the method, such as damping=0.01; may be given again", "method", "NAME=VALUE"
    ),
]
Paper = Annotated[bool, Option("the settings its authors published", "method")]
Methods = Annotated[Sequence[str], Option("with commas", "method", "NAMES", many=str)]

# --- talk -------------------------------------------------------------------------------------

Quiet = Annotated[bool, Option("no progress bars, no summary", "output")]
DryRun = Annotated[bool, Option("print the plan (layers, memory, passes, time) and stop", "output")]
