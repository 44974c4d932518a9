"""The learning rate that goes with a start, where one is suggested and the user chose none."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn

from lorainit.adapters.layers import configurations

logger = logging.getLogger("lorainit")


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


def set_rate(trainer: Any, rate: float | None) -> None:
    """Give the trainer the suggested rate where it has its default one and no optimizer; say what was done."""
    if rate is None:
        return
    arguments = trainer.args
    own = arguments.learning_rate
    if not is_default_rate(arguments):
        logger.info(
            "learning rate %.3g as you set it; with this start %.3g is suggested", own, rate
        )
    elif getattr(trainer, "optimizer", None) is not None:
        logger.info(
            "the optimizer has its learning rate already; with this start %.3g is suggested", rate
        )
    else:
        arguments.learning_rate = rate
        logger.info("learning rate %.3g, suggested with the start (%.3g is the default)", rate, own)
