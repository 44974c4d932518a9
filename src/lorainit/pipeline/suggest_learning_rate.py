"""From a model with an adapter, and data, to a learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import nn

from lorainit.adapters.factors_of import factors_of
from lorainit.adapters.heads import heads_of
from lorainit.adapters.layers import adapters_disabled, check_not_merged, true_config
from lorainit.adapters.match_learning_rate import resized_by
from lorainit.adapters.targets import match_targets
from lorainit.adapters.wrappers import unwrapped
from lorainit.calibration.learning_rate import LearningRate
from lorainit.models.page_locked import page_locked
from lorainit.models.state import one_at_a_time, outside_autocast, unchanged_generators
from lorainit.parallel.together import agreed, left_together
from lorainit.pipeline.checks import check_adapter_exists
from lorainit.pipeline.facts import facts_of
from lorainit.pipeline.first_steps import RATE_NEEDS
from lorainit.pipeline.measurements import Measurements
from lorainit.pipeline.rate import SEQUENCES, measured_rate, stands_at_measured_length
from lorainit.statistics.settings import CollectOptions, CollectSettings, settings_with


@outside_autocast
def suggest_learning_rate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    adapter_name: str = "default",
    settings: CollectSettings | None = None,
    **options: Unpack[CollectOptions],
) -> LearningRate:
    """A learning rate for the adapter that a model has, however it was started.

    Half of the sequences give the gradients of Adam's first two steps, from where the adapter stands (a start
    whose length was measured, until it is trained: from ``B = 0``), at four peak rates or a few more; on the
    others the loss is measured after them. That costs about as much as sixteen steps of training with batches
    of a quarter of the sequences. The model is as it was afterwards. Of an adapter that was matched to a rate
    (`match_learning_rate`) it is what suits it as it is now.

    Args:
        model: a PeftModel, or a model whose adapter is its own.
        data: batches of the target task, as `get_peft_model` takes them; 128 sequences are enough.
        adapter_name: of the adapter that is to be trained.
        settings: how the gradient is collected, see `CollectSettings`.
        **options: its fields, as keywords. ``max_sequences`` is 128 unless it is said.

    Returns:
        The rate with its range; ``float()`` of it is the number. It is the peak rate for AdamW with a short
        warmup and a decay to zero, as `transformers.Trainer` has them, judged on runs of 128 steps with
        batches of 32; of other optimizers, and of runs or batches ten times as large, nothing is known.

    Raises:
        AdapterError: there is no such adapter, it is merged, or its factors are on the meta device.
        DataError: too few sequences, no rate lowers the loss, or a head is trained in full beside the adapter
            (``modules_to_save``): the first steps say little of a run there.
    """
    with one_at_a_time(model), left_together(), unchanged_generators(data):
        with agreed() as facts:
            if settings is None and "max_sequences" not in options:
                options["max_sequences"] = SEQUENCES
            settings = settings_with(settings, options, "suggest_learning_rate")
            model = unwrapped(model)
            check_adapter_exists(model, adapter_name)
            check_not_merged(model)
            config = true_config(model, adapter_name)
            targets = match_targets(model, config)
            facts |= facts_of(config, settings, targets)
            facts |= {"function": "suggest_learning_rate", "adapter_name": adapter_name}
        measurements = Measurements(model, targets, RATE_NEEDS, settings)
        heads = heads_of(model, config, adapter_name, targets.layers, existing=True)
        with adapters_disabled(model), measurements.unchanged_rng(), page_locked(model):
            measurements, sample = measurements.with_own_loss(measurements.sample(data))
            factors = factors_of(model, adapter_name)
            return measured_rate(
                measurements,
                sample,
                factors,
                heads,
                resized_by(model, adapter_name),
                from_base=stands_at_measured_length(model, adapter_name, factors),
            )
