"""From a model, a configuration and data to an adapter that is started: the straight line."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Unpack

from peft import LoraConfig, PeftModel
from torch import nn

from lorainit.adapters import install as installing
from lorainit.adapters.create import create_adapter
from lorainit.adapters.factors_of import factors_of
from lorainit.adapters.heads import heads_of, written
from lorainit.adapters.layers import (
    adapters_disabled,
    check_not_merged,
    configurations,
    left_at_default,
)
from lorainit.adapters.match_learning_rate import resize, resized_by
from lorainit.adapters.origin import remember_measured
from lorainit.adapters.patterns import with_ranks
from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.restore import restored_on_error
from lorainit.adapters.targets import Targets, match_targets, skipped_experts
from lorainit.adapters.tensor_sources import TensorSource
from lorainit.adapters.wrappers import adapter_parameters, adapter_tensors, unwrapped
from lorainit.calibration.learning_rate import LearningRate
from lorainit.methods.auto import Auto
from lorainit.models.page_locked import page_locked
from lorainit.models.state import (
    one_at_a_time,
    outside_autocast,
    unchanged_generators,
    unchanged_rng_on_error,
)
from lorainit.parallel import collectives
from lorainit.parallel.partitioned import whole
from lorainit.parallel.sharding import is_sharded
from lorainit.parallel.together import agreed, left_together
from lorainit.pipeline.checks import (
    check_arguments,
    check_statistics,
    configuration,
    with_possible_ranks,
)
from lorainit.pipeline.facts import facts_of, facts_of_start
from lorainit.pipeline.first_steps import RATE_NEEDS
from lorainit.pipeline.heads import TIMES_AS_MANY, StartedHeads, start_heads
from lorainit.pipeline.measurements import Measurements
from lorainit.pipeline.rate import factors_norm, matched, rate_if_any, stands_at_measured_length
from lorainit.pipeline.start import Precision, Start, find_start, needs_sample
from lorainit.pipeline.summary import measured_losses, report_line, sequences_read, summary
from lorainit.statistics.settings import (
    CollectOptions,
    CollectSettings,
    checked_needs,
    settings_with,
)
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import Method, UsesDefaultStart, settings_of


@outside_autocast
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
    fit_heads: bool = True,
    precision: Precision = "fast",
    autocast_adapter_dtype: bool = True,
    suggest_rate: bool = False,
    learning_rate: float | None = None,
    settings: CollectSettings | None = None,
    **options: Unpack[CollectOptions],
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
        reference_weights: the weights that a quantized `model` was made from, for methods that give back
            what quantization took (`LoftQ`, `QERA`, `KroneckerQER`): a folder with a safetensors
            checkpoint, in one file or in shards, or one file; a mapping of parameter names to tensors; a
            model; or a function that gives ``(out, in)`` for a layer's name. They are read layer by
            layer, compared with the base before any work, and not kept.
        adapter_name: of the adapter to create or start again.
        cap_rank: lower the adapter's rank at layers that are too small for it; they keep it otherwise,
            filled up as PEFT would, see ``on_unused`` in `CollectSettings`.
        calibration_share: of `data`, held back from the statistics to measure a step's length on,
            where the method asks for that; with `statistics`, all of `data` is used.
        fit_heads: fit heads that PEFT trains beside the adapter (``modules_to_save``, also those that a task
            type adds) on the features that reach them, before the statistics are taken: the adapter's own
            copies, toward their present values, with the model's own loss, on up to four times
            ``max_sequences``; a head of classes goes a quarter of the way. Kept where that lowers the loss
            of held-back sequences by more than its standard error. Nothing is done without `data`, with
            `statistics` (which are of the heads as they were), to heads of more than 4,096 outputs, or to
            models that ``fully_shard`` has sharded.
        precision: ``"fast"``: solve in float32 (float64 where that fails), to residuals of a thousandth or
            less; ``"exact"``: in float64, to 1e-10.
        autocast_adapter_dtype: as in PEFT: adapters of half-precision models are kept in float32.
        suggest_rate: measure a learning rate for the adapter on 128 sequences of `data`, as
            `suggest_learning_rate` does; the log says it, and the adapter's side file keeps it.
        learning_rate: the peak rate that the adapter will be trained at, where that is not to be chosen. The
            rate that suits the start is measured, and the factors and ``lora_alpha`` are resized so that this
            one does the same (`match_learning_rate`): the adapter's ``lora_alpha`` is then not that of
            `peft_config`. Where no rate can be suggested, nothing is resized, and the log says why.
        settings: how statistics are collected, see `CollectSettings`.
        **options: its fields, as keywords: ``token_mask``, ``loss_reduction``, ``max_sequences``,
            ``loss_fn``, ``on_nonfinite``, ``on_unused``, ``max_memory``, ``gradient_dtype``, ``progress``.

    Returns:
        The PeftModel; `model` itself where that was one, or has the adapter as its own. Of
        ``torch.compile(model)`` it is around the model inside, under the model's own names: compile what is
        returned.

    Raises:
        LorainitError: bad input, found before any long work; the model is as it was.
    """
    with one_at_a_time(model), left_together(), unchanged_generators(data):
        with agreed() as facts:
            settings = settings_with(settings, options, "get_peft_model")
            model = unwrapped(model)
            method = Auto() if method is None else method
            check_arguments(
                model,
                peft_config,
                method,
                data,
                statistics,
                adapter_name,
                calibration_share,
                precision,
                reference_weights,
                suggest_rate=suggest_rate,
                learning_rate=learning_rate,
            )
            check_not_merged(model)
            existing = adapter_name in configurations(model)
            config = configuration(model, peft_config, adapter_name, existing)
            targets = match_targets(model, config)
            targets = with_possible_ranks(
                model, config, targets, method, cap_rank=cap_rank, on_small=settings.on_unused
            )
            facts |= facts_of(config, settings, targets)
            facts |= facts_of_start(
                method,
                statistics,
                data=data is not None,
                reference_weights=reference_weights is not None,
                adapter_name=adapter_name,
                cap_rank=cap_rank,
                calibration_share=calibration_share,
                fit_heads=fit_heads,
                precision=precision,
                autocast_adapter_dtype=autocast_adapter_dtype,
                suggest_rate=suggest_rate,
                learning_rate=learning_rate,
            )
        return _started(
            model,
            config,
            peft_config,
            method,
            data,
            statistics,
            targets,
            settings,
            reference_weights,
            adapter_name=adapter_name,
            existing=existing,
            calibration_share=calibration_share,
            fit_heads=fit_heads,
            precision=precision,
            autocast_adapter_dtype=autocast_adapter_dtype,
            suggest_rate=suggest_rate or learning_rate is not None,
            learning_rate=learning_rate,
        )


def _started(
    model: nn.Module,
    config: LoraConfig,
    asked: LoraConfig | None,
    method: Method,
    data: Iterable[Any] | None,
    statistics: Statistics | None,
    targets: Targets,
    settings: CollectSettings,
    reference_weights: TensorSource | None,
    *,
    adapter_name: str,
    existing: bool,
    calibration_share: float,
    fit_heads: bool,
    precision: Precision,
    autocast_adapter_dtype: bool,
    suggest_rate: bool,
    learning_rate: float | None,
) -> PeftModel:
    """The work, once every argument is checked; the model is as it was if it fails anywhere."""
    reference = None
    if reference_weights is not None:
        with collectives.shared_errors():
            reference = ReferenceWeights.of(reference_weights, targets.layers)
    if statistics is not None:
        check_statistics(statistics, targets, method, reference)
    # An adapter that exists is drawn anew, by the method itself.
    default = isinstance(method, UsesDefaultStart) and method.uses_default_start and not existing
    configured = copy.deepcopy(config)

    def reallocate(ranks: Mapping[str, int]) -> Targets:
        with_ranks(config, ranks, targets.configured_names)
        found = match_targets(model, config)
        return with_possible_ranks(model, config, found, method, cap_rank=False, on_small="default")

    # The layers of an adapter that exists have their ranks already.
    redistribute = None if existing else reallocate
    needs = checked_needs(method.needs) if method.needs else frozenset()
    measurements = Measurements(
        model, targets, needs, settings, reference=reference, with_ranks=redistribute
    )
    sampled = not default and needs_sample(method, statistics, has_data=data is not None)
    heads = StartedHeads()
    if fit_heads and data is not None and statistics is None and not is_sharded(model):
        heads = StartedHeads(
            heads_of(model, config, adapter_name, targets.layers, existing=existing)
        )
    start, sample = Start(), None
    if heads.heads or suggest_rate or not default:
        with adapters_disabled(model), measurements.unchanged_rng(), page_locked(model):
            if heads.heads or suggest_rate or sampled:
                drawing = measurements
                if suggest_rate:
                    drawing = replace(measurements, needs=needs | RATE_NEEDS)
                times = TIMES_AS_MANY if heads.heads else 1
                drawn, sample = drawing.with_own_loss(drawing.sample(data, times))
                measurements = replace(drawn, needs=needs)
            if heads.heads and sample is not None:
                heads = start_heads(heads.heads, measurements, sample, calibration_share)
                sample = sample.at_most(settings.max_sequences)
            if not default:
                with heads.in_use():
                    start = find_start(
                        method,
                        measurements,
                        sample if sampled else None,
                        statistics,
                        precision,
                        calibration_share,
                        heads_fitted=bool(heads.values),
                    )
    start = start.without_anchored_words(targets.layers)
    if start.refusal is not None:
        # Ranks were perhaps redistributed for the start that is not taken.
        config = configured
    left_out = targets.left_out | start.unused
    read = sequences_read(statistics, sample if sampled else None)
    with (
        unchanged_rng_on_error(measurements.device),
        whole(adapter_parameters(model, adapter_name), written=True),
        restored_on_error(model, adapter_name),
        installing.undone_on_error(model, adapter_name),
    ):
        if existing:
            wrapped: Any = model
            resize(model, adapter_name, 1 / resized_by(model, adapter_name))
        else:
            wrapped = create_adapter(model, config, adapter_name, autocast=autocast_adapter_dtype)
        with collectives.shared_errors():
            installing.install(
                wrapped,
                adapter_name,
                start.factors,
                settings_of(method),
                read | measured_losses(start),
                targets.filled_up,
                heads.record(),
            )
        # PEFT's own random start of the layers left at it, too.
        collectives.broadcast(adapter_tensors(wrapped, adapter_name), 0)
        if start.search is not None and start.refusal is None:
            norm = factors_norm(factors_of(wrapped, adapter_name))
            remember_measured(wrapped, adapter_name, {"factors_norm": norm})
        rate: LearningRate | str | None = None
        if suggest_rate and sample is not None:
            own = heads_of(wrapped, config, adapter_name, targets.layers, existing=True)
            with (
                adapters_disabled(wrapped),
                heads.in_use(),
                measurements.unchanged_rng(),
                page_locked(model),
            ):
                factors = factors_of(wrapped, adapter_name)
                there = stands_at_measured_length(wrapped, adapter_name, factors)
                rate = rate_if_any(measurements, sample, factors, own, from_base=there)
            if learning_rate is not None:
                rate = matched(wrapped, adapter_name, rate, learning_rate)
            elif isinstance(rate, LearningRate):
                remember_measured(wrapped, adapter_name, rate.measured())
        # Until the last line is out, on every process.
        with collectives.shared_errors(), written(wrapped, adapter_name, heads.heads, heads.values):
            if start.refusal is not None and not existing:
                # All layers are PEFT's own.
                left_out = {}
            elif not default:
                left_out |= left_at_default(wrapped, adapter_name, start.factors, left_out)
            started = {n: ranks for n, ranks in targets.filled_up.items() if n in start.sizes}
            skipped = skipped_experts(model, asked, targets)
            line = summary(method, start, left_out, started, skipped, heads.line(), rate)
            report_line(line, progress=settings.progress)
    return wrapped
