"""The learning rate that goes with a start, where one is suggested and the user chose none."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lorainit.adapters.layers import configurations
from lorainit.errors import AdapterError
from lorainit.pipeline.summary import report_line
from lorainit.trainers.kinds import has_preferences, is_on_policy


def suggested_rate(model: nn.Module, adapter_name: str) -> float | None:
    """The peak learning rate that was measured with the start of an adapter; None where none was."""
    origin = getattr(configurations(model).get(adapter_name), "origin", None)
    return None if origin is None else origin.measured.get("learning_rate")


def wants_rate(trainer: Any) -> bool:
    """Whether a rate would be taken: the class's default stands, and no optimizer has it yet."""
    return is_default_rate(trainer.args) and getattr(trainer, "optimizer", None) is None


def is_default_rate(arguments: Any) -> bool:
    """Whether the training arguments have the learning rate that their class has."""
    if not dataclasses.is_dataclass(arguments):
        return False
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    rate = getattr(arguments, "learning_rate", None)
    return rate is not None and rate == defaults.get("learning_rate")


def has_judged_rate(trainer: Any) -> bool:
    """Whether suggested rates were judged on losses like this trainer's.

    Of rewards on answers that change with the policy nothing is known. Of preferences it is known that one
    step hardly ever lowered the loss of other pairs, so that no rate was found, or one ten times too
    low (benchmarks/README.md, Preferences).
    """
    return not (is_on_policy(trainer) or has_preferences(trainer))


def rate_to_match(trainer: Any, *, judged: bool) -> float:
    """The learning rate of the training arguments, for the adapter to be resized for.

    Raises:
        AdapterError: of this trainer's loss no rate can be suggested, or it has none.
    """
    rate = getattr(trainer.args, "learning_rate", None)
    if not judged or not isinstance(rate, int | float):
        why = "of its loss none can be suggested" if not judged else "its arguments have none"
        raise AdapterError(
            f"match_learning_rate=True wants a learning rate that suits the start to match it to that of "
            f"{type(trainer).__name__}, and {why}. Leave match_learning_rate out."
        )
    return float(rate)


def say_default_rate(trainer: Any, *, progress: bool = True) -> None:
    """Where no rate can be suggested and the class's default stands, say what that means for an adapter."""
    if wants_rate(trainer):
        report_line(
            f"learning rate {trainer.args.learning_rate:.3g} of {type(trainer).__name__}, its default, "
            "stays: of its loss none can be suggested. What suits full fine-tuning hardly moves an adapter: "
            "with DPO, rates from 1e-4 to 1e-3 were best in benchmarks/README.md",
            progress=progress,
        )


def set_rate(trainer: Any, rate: float | None, *, progress: bool = True) -> None:
    """Give the trainer the suggested rate where it has its default one and no optimizer; say what was done."""
    if rate is None:
        return
    arguments = trainer.args
    own = arguments.learning_rate
    if not is_default_rate(arguments):
        said = f"learning rate {own:.3g} as you set it; with this start {rate:.3g} is suggested"
    elif getattr(trainer, "optimizer", None) is not None:
        said = (
            f"the optimizer has its learning rate already; with this start {rate:.3g} is suggested"
        )
    else:
        arguments.learning_rate = rate
        said = (
            f"learning rate {own:.3g}, which is the default, is now {rate:.3g}, suggested with the start; "
            "set_learning_rate=False leaves it"
        )
        if not getattr(arguments, "warmup_steps", 1) and not getattr(arguments, "warmup_ratio", 0):
            said += ". It is for a schedule with a warmup, of a tenth of the steps or so, and warmup_steps is 0"
    report_line(said, progress=progress)
