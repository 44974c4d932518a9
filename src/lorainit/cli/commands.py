"""The commands as functions: one signature each serves Python, the shell and YAML.

``lorainit init --model m --max-length 512`` in the shell, ``model: m`` and ``max_length: 512`` in a
file, and ``init(model="m", max_length=512)`` in Python are the same call. Nothing here imports torch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from lorainit.cli import options as o
from lorainit.cli.checks import check_numbers, check_places
from lorainit.cli.options import Option
from lorainit.cli.quiet import quiet_import


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        values: what ``--json`` prints.
        text: what is printed without it.
    """

    values: dict[str, Any]
    text: str


def methods(*, quiet: o.Quiet = False) -> Outcome:
    """List the methods: what each reads, whether the model's outputs are kept, its settings.

    Example::

        lorainit methods
    """
    return _run("listing", "methods", locals())


def collect(
    *,
    model: o.Model,
    data: o.Data,
    output: Annotated[str, Option("a .safetensors file", "output", "FILE")],
    method: Annotated[
        Sequence[str],
        Option("collect what these read; natural,eva is all there is", "method", "NAMES", many=str),
    ] = ("natural", "eva"),
    target_modules: o.TargetModules = "all-linear",
    max_sequences: o.MaxSequences = 256,
    token_mask: o.TokenMask = "attention",
    loss_reduction: o.LossReduction = "sequence",
    max_memory: o.MaxMemory = None,
    gradient_dtype: o.GradientDtype = "float32",
    max_length: o.MaxLength = 1024,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
) -> Outcome:
    r"""Collect statistics into a file, once, for any number of starts.

    Example::

        lorainit collect --model ./model --data train.jsonl --method natural,eva \
            --output target.safetensors
    """
    return _run("starting", "collect", locals())


def init(
    *,
    model: o.Model,
    output: Annotated[str, Option("of the adapter", "output", "FOLDER")],
    data: o.OptionalData = None,
    statistics: o.OptionalStatistics = None,
    reference: o.Reference = None,
    method: o.Method = "auto",
    set: o.Settings = None,
    paper: o.Paper = False,
    rank: o.Rank = 16,
    alpha: o.Alpha = None,
    rslora: o.RsLora = False,
    dropout: o.Dropout = 0.0,
    target_modules: o.TargetModules = "all-linear",
    cap_rank: o.CapRank = False,
    learning_rate: o.MatchedRate = None,
    max_sequences: o.MaxSequences = 256,
    token_mask: o.TokenMask = "attention",
    loss_reduction: o.LossReduction = "sequence",
    max_memory: o.MaxMemory = None,
    gradient_dtype: o.GradientDtype = "float32",
    max_length: o.MaxLength = 1024,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
) -> Outcome:
    r"""Start an adapter, and save it as an ordinary PEFT folder.

    Example::

        lorainit init --model ./model --data train.jsonl \
            --rank 16 --rslora --output start

    From statistics collected before, with the data only to measure the step's length::

        lorainit init --model ./model --statistics target.safetensors --data train.jsonl \
            --method natural --output start

    For a recipe whose learning rate is not to be changed::

        lorainit init --model ./model --data train.jsonl --learning-rate 2e-4 --output start

    A quantized model, brought nearer to the one that it was made from::

        lorainit init --model ./quantized --reference ./full --data train.jsonl \
            --method qera --output start
    """
    return _run("starting", "init", locals())


def train(
    *,
    model: o.Model,
    data: o.Data,
    output: Annotated[str, Option("of the trained adapter", "output", "FOLDER")],
    adapter: Annotated[
        str | None, Option("what 'lorainit init' wrote", "adapter", "FOLDER")
    ] = None,
    method: o.OptionalMethod = None,
    set: o.Settings = None,
    paper: o.Paper = False,
    rank: o.Rank = 16,
    alpha: o.Alpha = None,
    rslora: o.RsLora = False,
    dropout: o.Dropout = 0.0,
    target_modules: o.TargetModules = "all-linear",
    learning_rate: o.LearningRate = None,
    epochs: Annotated[float, Option("passes over the data", "training", above=0)] = 1.0,
    max_steps: Annotated[
        int, Option("stop after so many; -1: no limit", "training", least=-1)
    ] = -1,
    warmup_ratio: Annotated[
        float, Option("share of the steps", "training", least=0, below=1)
    ] = 0.1,
    logging_steps: Annotated[
        int | None,
        Option(
            "between two records of the loss, beside the first and the last step; default: a twentieth "
            "of all steps",
            "training",
            least=1,
        ),
    ] = None,
    max_sequences: o.MaxSequences = 256,
    token_mask: o.TokenMask = "attention",
    loss_reduction: o.LossReduction = "sequence",
    max_memory: o.MaxMemory = None,
    gradient_dtype: o.GradientDtype = "float32",
    max_length: o.MaxLength = 1024,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
) -> Outcome:
    r"""Train an adapter with TRL's SFTTrainer (needs the extra 'train').

    Example::

        lorainit train --model ./model --data train.jsonl --adapter start \
            --epochs 1 --output trained

    Start and train in one go::

        lorainit train --model ./model --data train.jsonl --method lora-da --output trained
    """
    return _run("training", "train", locals())


def compare(
    *,
    model: o.Model,
    data: o.Data,
    methods: o.Methods = ("vanilla", "lora-da", "natural"),
    learning_rates: Annotated[
        Sequence[float],
        Option(
            "to try beside the suggested one, with commas; more are tried where the best is the outermost",
            "training",
            "RATES",
            many=float,
            above=0,
        ),
    ] = (1e-4, 3e-4, 1e-3),
    steps: Annotated[int, Option("of training, each run", "training", least=1)] = 100,
    held_out: Annotated[
        int, Option("records kept from training, to measure on", "data", least=1)
    ] = 64,
    output: Annotated[
        str | None,
        Option("the result as JSON, which 'lorainit report --curves' draws", "output", "FILE"),
    ] = None,
    rank: o.Rank = 16,
    alpha: o.Alpha = None,
    rslora: o.RsLora = False,
    dropout: o.Dropout = 0.0,
    target_modules: o.TargetModules = "all-linear",
    max_sequences: o.MaxSequences = 256,
    token_mask: o.TokenMask = "attention",
    loss_reduction: o.LossReduction = "sequence",
    max_memory: o.MaxMemory = None,
    gradient_dtype: o.GradientDtype = "float32",
    max_length: o.MaxLength = 1024,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    dry_run: o.DryRun = False,
    quiet: o.Quiet = False,
) -> Outcome:
    r"""Train a few steps from several starts, each at its best learning rate, and tabulate.

    Example::

        lorainit compare --model ./model --data train.jsonl \
            --methods vanilla,lora-da,natural --learning-rates 1e-4,3e-4,1e-3 --steps 100 \
            --output compared.json
    """
    return _run("comparing", "compare", locals())


def report(
    *,
    model: o.Model,
    statistics: o.StatisticsOfStart = None,
    output: Annotated[str, Option("the page", "output", "FILE")] = "report.html",
    adapter: Annotated[
        str | None, Option("a start, to show its size and its loss", "adapter", "FOLDER")
    ] = None,
    data: o.OptionalData = None,
    reference: o.Reference = None,
    curves: Annotated[
        Sequence[str],
        Option(
            "learning curves: folders or trainer_state.json of a Trainer, or what "
            "'lorainit compare --output' wrote; NAME=PATH gives one a name",
            "curves",
            "PATHS",
            many=str,
        ),
    ] = (),
    methods: Annotated[
        Sequence[str], Option("whose subspaces are compared", "method", "NAMES", many=str)
    ] = ("lora-da", "natural", "lora-one", "eva", "pissa"),
    rank: o.Rank = 16,
    alpha: o.Alpha = None,
    rslora: o.RsLora = False,
    target_modules: o.TargetModules = "all-linear",
    max_sequences: o.MaxSequences = 256,
    max_memory: o.MaxMemory = None,
    max_length: o.MaxLength = 1024,
    batch_size: o.BatchSize = 8,
    seed: o.Seed = 0,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
) -> Outcome:
    r"""Write one HTML page: what the data asks of each layer, and what a rank keeps of it.

    With --adapter its rank and layers are taken, and how far it goes is shown; with --data its loss
    is measured beside the base model's, unless these are the records that it was started from.

    Example::

        lorainit report --model ./model --adapter start

    With statistics from a file, records that were held back, and runs to draw::

        lorainit report --model ./model --statistics target.safetensors --adapter start \
            --data held.jsonl --curves trained,compared.json --output report.html

    Of a quantized model, what quantization took from each layer and what the adapter gives back::

        lorainit report --model ./quantized --reference ./full --statistics target.safetensors \
            --adapter start --output report.html
    """
    return _run("reporting", "report", locals())


def export(
    *,
    model: o.Model,
    adapter: Annotated[str, Option("the adapter to write", "adapter", "FOLDER")],
    output: Annotated[str, Option("where to", "output", "FOLDER")],
    rank: Annotated[
        int | None, Option("cut to this rank, and report the error", "adapter", least=1)
    ] = None,
    max_rank: Annotated[
        int | None, Option("the server's limit (vLLM: 16)", "adapter", least=1)
    ] = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    quiet: o.Quiet = False,
) -> Outcome:
    """Write an adapter for servers: one rank, one scaling, nothing else to know.

    Example::

        lorainit export --model ./model --adapter trained --output served --rank 16
    """
    return _run("exporting", "export", locals())


COMMANDS: dict[str, Callable[..., Outcome]] = {
    command.__name__: command
    for command in (methods, collect, init, train, compare, report, export)
}
"""By name, in the order of the help."""


def _run(module: str, command: str, arguments: dict[str, Any]) -> Outcome:
    """Check what can be checked quickly, and import what does the work, which takes seconds, only then."""
    check_numbers(COMMANDS[command], arguments)
    options = Namespace(command=command, **arguments)
    check_places(options)
    if command != "methods":
        quiet_import("lorainit.cli.choices").check_choices(options)
    values, text = quiet_import(f"lorainit.cli.{module}").run(options)
    return Outcome(values, text)
