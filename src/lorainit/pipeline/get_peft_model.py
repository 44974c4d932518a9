"""From a model, a configuration and data to an adapter that is started: the straight line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from peft import LoraConfig, PeftModel
from torch import nn

from lorainit.adapters import install as installing
from lorainit.adapters.create import create_adapter
from lorainit.adapters.layers import adapters_off, check_not_merged, left_at_default
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Targets, match_targets
from lorainit.adapters.tensor_sources import TensorSource
from lorainit.adapters.wrappers import adapter_tensors, unwrapped
from lorainit.methods.auto import Auto
from lorainit.models.state import unchanged_rng_on_error
from lorainit.parallel import collectives
from lorainit.pipeline.checks import (
    check_arguments,
    check_statistics,
    configuration,
    with_possible_ranks,
)
from lorainit.pipeline.measurements import Measurements
from lorainit.pipeline.start import Precision, Start, find_start, needs_sample
from lorainit.pipeline.summary import measured_losses, report_line, summary
from lorainit.statistics.settings import (
    CollectOptions,
    CollectSettings,
    checked_needs,
    settings_with,
)
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import Method, UsesDefaultStart, settings_of


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig | None,
    *,
    method: Method | None = None,
    data: Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    reference_weights: TensorSource | None = None,
    adapter_name: str = "default",
    cap_rank: bool = False,
    calibration_share: float = 0.2,
    precision: Precision = "fast",
    autocast_adapter_dtype: bool = True,
    settings: CollectSettings | None = None,
    **options: Unpack[CollectOptions],
) -> PeftModel:
    """An ordinary PeftModel whose adapter starts where the data says it should.

    Args:
        model: a base model; or a PeftModel, which gets a new adapter, or whose adapter of this name
            is started again. No weight of the base is changed by a bit, now or later.
        peft_config: any LoraConfig; it is copied. None for an existing adapter's own.
        method: how to find the start, for example ``lorainit.LoraDA()``. Default: ``lorainit.Auto()``.
        data: batches to collect statistics from, see `collect_statistics`.
        statistics: statistics collected before, instead of `data`.
        reference_weights: the weights that a quantized `model` was made from, for methods that give back
            what quantization took (`LoftQ`, `QERA`, `KroneckerQER`): a folder with a safetensors
            checkpoint, in one file or in shards, or one file; a mapping of parameter names to tensors; a
            model; or a function that gives ``(out, in)`` for a layer's name. They are read layer by
            layer, compared with the base before any work, and not kept.
        adapter_name: of the adapter to create or start again.
        cap_rank: lower the rank of layers that are too small for it, instead of an error.
        calibration_share: of `data`, held back from the statistics to measure a step's length on,
            where the method asks for that; with `statistics`, all of `data` is used.
        precision: ``"fast"``: solve in float32 (float64 where that fails), to residuals of a thousandth or
            less; ``"exact"``: in float64, to 1e-10.
        autocast_adapter_dtype: as in PEFT: adapters of half-precision models are kept in float32.
        settings: how statistics are collected, see `CollectSettings`.
        **options: its fields, as keywords: ``token_mask``, ``loss_reduction``, ``max_sequences``,
            ``loss_fn``, ``on_nonfinite``, ``on_unused``, ``max_memory``, ``gradient_dtype``, ``progress``.

    Returns:
        The PeftModel; `model` itself where that was one.

    Raises:
        LorainitError: bad input, found before any long work; the model is as it was.
    """
    settings = settings_with(settings, options, "get_peft_model")
    model = unwrapped(model)
    method = Auto() if method is None else method
    check_arguments(model, peft_config, method, data, statistics, adapter_name, reference_weights)
    check_not_merged(model)
    existing = isinstance(model, PeftModel) and adapter_name in model.peft_config
    config = configuration(model, peft_config, adapter_name, existing)
    targets = match_targets(model, config)
    targets = with_possible_ranks(model, config, targets, method, cap_rank=cap_rank)
    if statistics is not None:
        check_statistics(statistics, targets, method)
    reference = None
    if reference_weights is not None:
        with collectives.shared_errors():
            reference = ReferenceWeights.of(reference_weights, targets.layers)
    # An adapter that exists is drawn anew, by the method itself.
    default = isinstance(method, UsesDefaultStart) and method.uses_default_start and not existing
    configured = copy.deepcopy(config)

    def reallocate(ranks: Mapping[str, int]) -> Targets:
        with_ranks(config, ranks, targets.configured_names)
        return match_targets(model, config)

    # The layers of an adapter that exists have their ranks already.
    redistribute = None if existing else reallocate
    needs = checked_needs(method.needs) if method.needs else frozenset()
    measurements = Measurements(
        model, targets, needs, settings, reference=reference, with_ranks=redistribute
    )
    start = Start()
    if not default:
        with adapters_off(model), measurements.unchanged_rng():
            sample = None
            if needs_sample(method, statistics, has_data=data is not None):
                sample = measurements.sample(data)
            start = find_start(
                method, measurements, sample, statistics, precision, calibration_share
            )
    if start.refusal is not None:
        # Ranks were perhaps redistributed for the start that is not taken.
        config = configured
    left_out = targets.left_out | start.unused
    with (
        unchanged_rng_on_error(measurements.device),
        installing.undone_on_error(model, adapter_name),
    ):
        if existing:
            assert isinstance(model, PeftModel)
            wrapped = model
        else:
            wrapped = create_adapter(model, config, adapter_name, autocast=autocast_adapter_dtype)
        with collectives.shared_errors():
            installing.install(
                wrapped, adapter_name, start.factors, settings_of(method), measured_losses(start)
            )
        # PEFT's own random start of the layers left at it, too.
        collectives.broadcast(adapter_tensors(wrapped, adapter_name), 0)
    if start.refusal is not None and not existing:
        # All layers are PEFT's own.
        left_out = {}
    elif not default:
        left_out |= left_at_default(wrapped, adapter_name, start.factors, left_out)
    report_line(summary(method, start, left_out), progress=settings.progress)
    return wrapped
