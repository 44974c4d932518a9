"""How statistics are collected, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from lorainit.statistics.anatomy import input_device
from lorainit.statistics.losses import LossFunction
from lorainit.statistics.plan import parse_bytes
from lorainit.types import STATISTICS, GradientDtype, LossReduction, TokenMask


@dataclass(frozen=True)
class CollectSettings:
    """How statistics are collected; see `lorainit.collect_statistics` for each."""

    needs: frozenset[str]
    token_mask: TokenMask = "attention"
    loss_reduction: LossReduction = "sequence"
    max_sequences: int | None = 256
    on_nonfinite: Literal["raise", "skip"] = "raise"
    on_unused: Literal["raise", "default"] = "raise"
    progress: bool = True
    max_memory: int | str | None = None
    gather: bool = True
    gradient_dtype: GradientDtype = "float32"

    def __post_init__(self) -> None:
        if not self.needs:
            raise ValueError(
                "needs is empty, so there is nothing to collect. Pass method.needs, or some of: "
                f"{', '.join(sorted(STATISTICS))}."
            )
        unknown = set(self.needs) - STATISTICS
        if unknown:
            raise ValueError(
                f"unknown statistics in needs: {', '.join(sorted(map(str, unknown)))}. "
                f"There are: {', '.join(sorted(STATISTICS))}."
            )
        for name, choices in (
            ("token_mask", get_args(TokenMask)),
            ("loss_reduction", get_args(LossReduction)),
            ("gradient_dtype", get_args(GradientDtype)),
            ("on_nonfinite", ("raise", "skip")),
            ("on_unused", ("raise", "default")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        parse_bytes(self.max_memory)
        if self.max_sequences is not None and self.max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1 or None, got {self.max_sequences}")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its layers to measure by target name, and how; `loss_fn` None: the default loss."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    settings: CollectSettings
    loss_fn: LossFunction | None = None

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return input_device(self.model)
