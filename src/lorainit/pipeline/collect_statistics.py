"""From a model, a configuration and data to statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from peft import LoraConfig
from torch import nn

from lorainit.adapters.layers import adapters_disabled, check_not_merged
from lorainit.adapters.targets import match_targets
from lorainit.adapters.wrappers import unwrapped
from lorainit.models.page_locked import page_locked
from lorainit.models.state import one_at_a_time, outside_autocast, unchanged_generators
from lorainit.parallel.together import agreed, left_together
from lorainit.pipeline.facts import facts_of
from lorainit.pipeline.measurements import Measurements
from lorainit.statistics.settings import (
    CollectOptions,
    CollectSettings,
    checked_needs,
    settings_with,
)
from lorainit.statistics.store.statistics import Statistics


@outside_autocast
def collect_statistics(
    model: nn.Module,
    peft_config: LoraConfig,
    *,
    data: Iterable[Any],
    needs: Iterable[str],
    gather: bool = True,
    settings: CollectSettings | None = None,
    **options: Unpack[CollectOptions],
) -> Statistics:
    """Collect what methods read, in one pass over a few batches of target data.

    Args:
        model: a base model or a PeftModel (of which the base is measured, adapters switched off). It
            is the same afterwards, bit for bit.
        peft_config: says which layers are targets.
        data: any iterable of keyword batches that the model's forward takes, with ``labels``.
        needs: names of the statistics, ``method.needs``; a union of several methods' serves them all.
        gather: over several processes, give all layers to every process. If not, each keeps about as
            many bytes of layers as every other, and the result serves `get_peft_model` on the same
            processes, or ``save``, which all of them must call.
        settings: how they are collected, see `CollectSettings`.
        **options: its fields, as keywords: ``token_mask``, ``loss_reduction``, ``max_sequences``,
            ``loss_fn``, ``on_nonfinite``, ``on_unused``, ``max_memory``, ``gradient_dtype``, ``progress``.

    Returns:
        Statistics by module name, in the units of their docstrings.

    Raises:
        TargetError, DataError, NonFiniteError, MemoryPlanError: see each; the model is as it was.
    """
    with one_at_a_time(model), left_together():
        with agreed() as facts:
            settings = settings_with(settings, options, "collect_statistics")
            names = checked_needs(needs)
            model = unwrapped(model)
            check_not_merged(model)
            targets = match_targets(model, peft_config)
            facts |= facts_of(peft_config, settings, targets)
            facts |= {"function": "collect_statistics", "needs": sorted(names), "gather": gather}
        measurements = Measurements(model, targets, names, settings, gather=gather)
        with (
            adapters_disabled(model),
            measurements.unchanged_rng(),
            unchanged_generators(data),
            page_locked(model),
        ):
            measurements, sample = measurements.with_own_loss(measurements.sample(data))
            return measurements.statistics(sample)
