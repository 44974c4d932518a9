"""How statistics are collected, and of what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict, get_args

import torch
from torch import nn

from lorainit.models.introspection import input_device
from lorainit.statistics.loss.batch_loss import LossFunction
from lorainit.types import STATISTICS, GradientDtype, LossReduction, TokenMask
from lorainit.types.byte_size import parse_bytes
from lorainit.types.numbers import require_count, shown

OnNonfinite = Literal["raise", "skip"]
OnUnused = Literal["raise", "default"]


@dataclass(frozen=True)
class CollectSettings:
    """How statistics are collected: what `collect_statistics` and `get_peft_model` have in common.

    Both take such an object as ``settings``, or its fields as keywords.

    Args:
        token_mask: ``"attention"``: positions that attend count in the second moments, by the masks that
            the model's forward is called with; ``"labels"``:
            positions that predict a label (causal language models). The gradient is never masked.
        loss_reduction: ``"sequence"``: each sequence's loss is the mean over its own label tokens;
            ``"token"``: their sum, and the gradient is divided by all label tokens.
        max_sequences: a cap, over all processes together; None for all of the data.
        loss_fn: ``loss_fn(model, batch)`` to ``(sequences,)`` losses. The default is the model's own loss:
            from the logits of whole batches (cross-entropy; mean squared error for regression) where that
            is what the model itself gives of one sequence, else as the model gives it, one sequence at a time.
        on_nonfinite: what to do about sequences whose loss is not finite: ``"raise"``, or
            ``"skip"``: they are named in the log, counted in the statistics' ``metadata`` under
            ``"skipped_sequences"``, and the rest of their batch is run without them.
        on_unused: what to do about targets that no sequence reached (experts of a mixture among them,
            layers whose weight the model reads directly) or whose ``min(out, in)`` is below the rank:
            ``"default"``: the former start as PEFT starts them, the latter at their own rank with PEFT's
            rows beyond it, and the log names them with the reason; ``"raise"``. It is an error in any
            case if no target was reached.
        max_memory: what the model, the statistics and a batch may take together on the model's device,
            in bytes or as ``"24GiB"``. Default: what is free there; no limit on a CPU. Where that is
            too little for one pass, batches are cut to fewer rows, and layers are collected block by block
            or in several passes, each part moved to the host (in `get_peft_model`: solved before the
            next); the log says which.
        gradient_dtype: what gradients are added up in: ``"float32"`` (float64 where the model computes in
            it), or ``"bfloat16"``, half the bytes, rounded once a batch (or part of one) as a model's own
            ``.grad`` is; for methods that follow the gradient itself, LoRA-GA and LoRA-One.
        progress: show a progress bar.

    Raises:
        ValueError: a value that is not allowed, with those that are.
    """

    token_mask: TokenMask = "attention"
    loss_reduction: LossReduction = "sequence"
    max_sequences: int | None = 256
    loss_fn: LossFunction | None = None
    on_nonfinite: OnNonfinite = "raise"
    on_unused: OnUnused = "default"
    max_memory: int | str | None = None
    gradient_dtype: GradientDtype = "float32"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("token_mask", get_args(TokenMask)),
            ("loss_reduction", get_args(LossReduction)),
            ("gradient_dtype", get_args(GradientDtype)),
            ("on_nonfinite", get_args(OnNonfinite)),
            ("on_unused", get_args(OnUnused)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        parse_bytes(self.max_memory)
        if self.max_sequences is not None:
            require_count("max_sequences, where it is not None,", self.max_sequences)
        if self.loss_fn is not None and not callable(self.loss_fn):
            raise ValueError(
                f"loss_fn must be a function of the model and a batch, got {shown(self.loss_fn)}"
            )

    @property
    def budget(self) -> int | None:
        """``max_memory`` in bytes; None where the user did not say."""
        return parse_bytes(self.max_memory)


class CollectOptions(TypedDict, total=False):
    """The fields of `CollectSettings` as keywords."""

    token_mask: TokenMask
    loss_reduction: LossReduction
    max_sequences: int | None
    loss_fn: LossFunction | None
    on_nonfinite: OnNonfinite
    on_unused: OnUnused
    max_memory: int | str | None
    gradient_dtype: GradientDtype
    progress: bool


def settings_with(
    settings: CollectSettings | None, options: CollectOptions, function: str
) -> CollectSettings:
    """`settings`, or the defaults, with the fields that `options` gives.

    Raises:
        TypeError: `options` holds what is no field, as Python itself says it of `function`.
    """
    known = [field.name for field in fields(CollectSettings)]
    for name in options:
        if name not in known:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}. The settings of a "
                f"collection are: {', '.join(known)}."
            )
    return replace(settings or CollectSettings(), **options)


def checked_needs(needs: Iterable[str]) -> frozenset[str]:
    """The names of statistics to collect.

    Raises:
        ValueError: there are none, or one names no statistic.
    """
    known = ", ".join(sorted(STATISTICS))
    names = frozenset(needs)
    if not names:
        raise ValueError(
            "needs is empty, so there is nothing to collect. Pass method.needs, or some of: "
            + known
        )
    if unknown := names - STATISTICS:
        raise ValueError(
            f"unknown statistics in needs: {', '.join(sorted(map(str, unknown)))}. There are: {known}."
        )
    return names


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its layers to measure by target name, and what is collected of them and how.

    Attributes:
        model: a base model, or a PeftModel whose adapters are switched off.
        modules: base layers by target name.
        needs: names of the statistics.
        settings: how they are collected.
        gather: give all layers to every process; if not, each keeps its share.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    needs: frozenset[str]
    settings: CollectSettings
    gather: bool = True

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return input_device(self.model)
