"""The straight line: targets, statistics, factors, adapter."""

from __future__ import annotations

import copy
import logging
import statistics as stats
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Literal

from peft import LoraConfig, PeftModel
from torch import nn
from tqdm.auto import tqdm

from lorainit.adapters import install as installing
from lorainit.adapters.create import create_adapter
from lorainit.adapters.layers import (
    adapters_disabled,
    check_not_merged,
    configurations,
    left_at_default,
)
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.targets import Targets, match_targets
from lorainit.adapters.wrappers import adapter_tensors, unwrapped
from lorainit.checks import (
    check_arguments,
    check_statistics,
    configuration,
    with_possible_ranks,
)
from lorainit.methods.auto import Auto
from lorainit.methods.vanilla import Vanilla
from lorainit.start import Measured, Start, find_start
from lorainit.statistics import CollectSettings, LossFunction, Statistics, distributed
from lorainit.statistics.anatomy import input_device
from lorainit.statistics.guard import unchanged_rng, unchanged_rng_on_error
from lorainit.types import GradientDtype, LossReduction, Method, TokenMask, settings_of
from lorainit.warming import libraries_loading

logger = logging.getLogger("lorainit")


def collect_statistics(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    data: Iterable[Any],
    needs: Iterable[str],
    token_mask: TokenMask = "attention",
    loss_reduction: LossReduction = "sequence",
    max_sequences: int | None = 256,
    loss_fn: LossFunction | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_unused: Literal["raise", "default"] = "raise",
    gather: bool = True,
    max_memory: int | str | None = None,
    gradient_dtype: GradientDtype = "float32",
    progress: bool = True,
) -> Statistics:
    """Collect what methods read, in one pass over a few batches of target data.

    Args:
        model: a base model or a PeftModel (of which the base is measured, adapters switched off). It
            is the same afterwards, bit for bit.
        peft_config: says which layers are targets.
        data: any iterable of keyword batches that the model's forward takes, with ``labels``.
        needs: names of the statistics, ``method.needs``; a union of several methods' serves them all.
        token_mask: ``"attention"``: positions that attend count in the second moments; ``"labels"``:
            positions that predict a label (causal language models). The gradient is never masked.
        loss_reduction: ``"sequence"``: each sequence's loss is the mean over its own label tokens;
            ``"token"``: their sum, and the gradient is divided by all label tokens.
        max_sequences: a cap, over all processes together; None for all of `data`.
        loss_fn: ``loss_fn(model, batch)`` to ``(sequences,)`` losses, where the default (cross-entropy
            from the logits; mean squared error for regression) does not fit.
        on_nonfinite: what to do about sequences whose loss is not finite: ``"raise"``, or
            ``"skip"``: they are named in the log, counted in the statistics' ``metadata`` under
            ``"skipped_sequences"``, and the rest of their batch is run without them.
        on_unused: what to do about targets that no sequence reached, experts of a mixture among
            them: ``"raise"``, or ``"default"``: start them as PEFT does, and name them in the log.
        gather: over several processes, give all layers to every process. If not, each keeps about as
            many bytes of layers as every other, and the result serves `get_peft_model` on the same
            processes, or ``save``, which all of them must call.
        max_memory: what the model, the statistics and a batch may take together on the model's device,
            in bytes or as ``"24GiB"``. Default: what is free there; no limit on a CPU. Where that is
            too little for one pass, batches are cut to fewer rows, and layers are collected in several
            passes, each moved to the host; the log says which.
        gradient_dtype: what gradients are added up in: ``"float32"`` (float64 where the model computes in
            it), or ``"bfloat16"``, half the bytes, rounded once a batch (or part of one) as a model's own
            ``.grad`` is; for methods that follow the gradient itself, LoRA-GA and LoRA-One.
        progress: show a progress bar.

    Returns:
        Statistics by module name, in the units of their docstrings.

    Raises:
        TargetError, DataError, NonFiniteError, MemoryPlanError: see each; the model is as it was.
    """
    model = unwrapped(model)
    check_not_merged(model)
    targets = match_targets(model, peft_config)
    settings = CollectSettings(
        needs=frozenset(needs),
        token_mask=token_mask,
        loss_reduction=loss_reduction,
        max_sequences=max_sequences,
        on_nonfinite=on_nonfinite,
        on_unused=on_unused,
        max_memory=max_memory,
        gradient_dtype=gradient_dtype,
        progress=progress,
        gather=gather,
    )
    measured = Measured(model, targets, settings, loss_fn, 0.0, progress)
    with adapters_disabled(model):
        return measured.statistics(data)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig | None,
    *,
    method: Method | None = None,
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    adapter_name: str = "default",
    token_mask: TokenMask = "attention",
    loss_reduction: LossReduction = "sequence",
    max_sequences: int | None = 256,
    loss_fn: LossFunction | None = None,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    on_unused: Literal["raise", "default"] = "raise",
    cap_rank: bool = False,
    calibration_share: float = 0.2,
    precision: Literal["fast", "exact"] = "fast",
    max_memory: int | str | None = None,
    gradient_dtype: GradientDtype = "float32",
    autocast_adapter_dtype: bool = True,
    progress: bool = True,
) -> PeftModel:
    """An ordinary PeftModel whose adapter starts where the data says it should.

    Args:
        model: a base model; or a PeftModel, which gets a new adapter, or whose adapter of this name
            is started again; or a model whose adapter of this name is its own (``model.add_adapter`` of
            transformers, diffusers and sentence-transformers, ``peft.inject_adapter_in_model``). No weight
            of the base is changed by a bit, now or later.
        peft_config: any LoraConfig; it is copied. None for an existing adapter's own.
        method: how to find the start, for example ``lorainit.LoraDA()``. Default: ``lorainit.Auto()``.
        data: batches to collect statistics from, see `collect_statistics`.
        statistics: statistics collected before, instead of `data`.
        adapter_name: of the adapter to create or start again.
        token_mask: see `collect_statistics`.
        loss_reduction: see `collect_statistics`.
        max_sequences: see `collect_statistics`.
        loss_fn: see `collect_statistics`.
        on_nonfinite: see `collect_statistics`.
        on_unused: see `collect_statistics`.
        cap_rank: lower the rank of layers that are too small for it, instead of an error.
        calibration_share: of `data`, held back from the statistics to measure a step's length on,
            where the method asks for that; with `statistics`, all of `data` is used.
        precision: ``"fast"``: solve in float32 (float64 where that fails), to residuals of a thousandth or
            less; ``"exact"``: in float64, to 1e-10.
        max_memory: see `collect_statistics`; each pass's layers are solved before the next pass.
        gradient_dtype: see `collect_statistics`.
        autocast_adapter_dtype: as in PEFT: adapters of half-precision models are kept in float32.
        progress: show progress bars.

    Returns:
        The PeftModel; `model` itself where that was one, or has the adapter as its own.

    Raises:
        LorainitError: bad input, found before any long work; the model is as it was.
    """
    model = unwrapped(model)
    method = Auto() if method is None else method
    check_arguments(model, peft_config, method, data, statistics, adapter_name)
    check_not_merged(model)
    existing = adapter_name in configurations(model)
    config = configuration(model, peft_config, adapter_name, existing)
    targets = match_targets(model, config)
    targets = with_possible_ranks(model, config, targets, method, cap_rank=cap_rank)
    if statistics is not None:
        check_statistics(statistics, targets, method)
    plain = isinstance(method, Vanilla) and method.size == 1 and not existing
    start = Start({}, {}, {}, None)
    if not plain:
        settings = None
        if method.needs:
            settings = CollectSettings(
                needs=method.needs,
                token_mask=token_mask,
                loss_reduction=loss_reduction,
                max_sequences=max_sequences,
                on_nonfinite=on_nonfinite,
                on_unused=on_unused,
                max_memory=max_memory,
                gradient_dtype=gradient_dtype,
                progress=progress,
                gather=False,
            )

        asked = copy.deepcopy(config)

        def reallocate(ranks: Mapping[str, int]) -> Targets:
            with_ranks(config, ranks, targets.configured_names)
            return match_targets(model, config)

        measured = Measured(
            model,
            targets,
            settings,
            loss_fn,
            calibration_share,
            progress,
            # The layers of an adapter that exists have their ranks already.
            None if existing else reallocate,
            # Within a budget nothing is there that was not planned.
            nullcontext
            if max_memory is not None
            else partial(libraries_loading, method, input_device(model)),
        )
        with adapters_disabled(model), unchanged_rng(input_device(model)):
            start = find_start(method, measured, data, statistics, precision)
        if start.plain:
            # Ranks were perhaps redistributed for the start that is not taken.
            config = asked
    left_out = targets.left_out | start.unused
    device = input_device(model)
    with unchanged_rng_on_error(device), installing.undone_on_error(model, adapter_name):
        if existing:
            wrapped: Any = model
        else:
            wrapped = create_adapter(
                model,
                config,
                adapter_name,
                targets,
                start.factors,
                autocast=autocast_adapter_dtype,
            )
        with distributed.together():
            installing.install(
                wrapped, adapter_name, start.factors, _settings_of(method), _measured(start)
            )
        # PEFT's own random start of the layers left at it, too.
        distributed.broadcast(adapter_tensors(wrapped, adapter_name), 0)
    if start.plain and not existing:
        # All layers are PEFT's own.
        left_out = {}
    elif not plain:
        left_out |= left_at_default(wrapped, adapter_name, start.factors, left_out)
    _say(_summary(method, start, left_out), progress)
    return wrapped


def _settings_of(method: Method) -> dict[str, object]:
    """A method's name, and its settings where it is a dataclass."""
    return settings_of(method) if is_dataclass(method) else {"method": type(method).__name__}


def _measured(start: Start) -> dict[str, float]:
    """Losses on the calibration sequences, before and after the start."""
    if start.search is None:
        return {}
    search = start.search
    if start.plain:
        return {
            "base_loss": search.start_loss,
            "start_loss": search.start_loss,
            "length": 0.0,
            "refused_loss": search.loss,
        }
    return {
        "base_loss": search.start_loss,
        "start_loss": search.loss,
        "length": search.length,
    }


def _say(line: str, progress: bool) -> None:
    """Log the line; where nobody listens to the log, show it above the progress bars."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif progress:
        tqdm.write(line, file=sys.stderr)


def _summary(method: Method, start: Start, left_out: Mapping[str, str]) -> str:
    """One line: how large the start is, and what was left out and why."""
    line, sizes = f"{type(method).__name__}: ", start.sizes
    if start.plain:
        assert start.search is not None
        line += (
            f"plain LoRA: the measured start would take {start.search.gain:.1%} of the loss away, less "
            f"than {getattr(method, 'least_gain', 0.0):.0%}"
        )
    elif sizes:
        line += (
            f"{len(sizes)} layers started, |s B A| / |W| largest {max(sizes.values()):.2g}, "
            f"median {stats.median(sizes.values()):.2g}"
        )
    else:
        line += "PEFT's own start"
    if start.search is not None and not start.plain:
        line += f", calibration loss {start.search.start_loss:.4g} to {start.search.loss:.4g}"
    if left_out:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        line += f". Left at PEFT's start: {shown}{more}"
    return line
