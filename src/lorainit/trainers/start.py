"""`start_trainer`: one line between building a trainer and ``train()``."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, get_args

from torch import nn

from lorainit.adapters.layers import adapters_disabled
from lorainit.adapters.tensor_sources import TensorSource
from lorainit.data.batch import Batch
from lorainit.errors import AdapterError
from lorainit.methods.auto import Auto
from lorainit.models.introspection import input_device
from lorainit.models.packed_layers import unpacked
from lorainit.models.state import measuring, unchanged_rng
from lorainit.pipeline.get_peft_model import get_peft_model
from lorainit.pipeline.start import Precision
from lorainit.statistics.loss.togetherness import labelled_units
from lorainit.statistics.settings import CollectOptions, CollectSettings, settings_with
from lorainit.trainers.batches import DrawnBatches, draw_batches
from lorainit.trainers.kinds import (
    Loss,
    adapter_of,
    check_reference,
    check_trainer,
    examples_in,
    is_on_policy,
    loss_of,
)
from lorainit.trainers.learning_rate import (
    has_judged_rate,
    rate_to_match,
    say_default_rate,
    set_rate,
    suggested_rate,
    wants_rate,
)
from lorainit.trainers.loss import TrainerLoss
from lorainit.trainers.on_policy import check_advantages
from lorainit.trainers.optimizer import check_optimizer
from lorainit.trainers.unchanged import unchanged_trainer
from lorainit.types import Method

logger = logging.getLogger("lorainit")


def start_trainer(
    trainer: Any,
    method: Method | None = None,
    loss: Loss | None = None,
    *,
    adapter_name: str | None = None,
    set_learning_rate: bool = True,
    match_learning_rate: bool = False,
    reference_weights: TensorSource | None = None,
    calibration_share: float = 0.2,
    fit_heads: bool = True,
    precision: Precision = "fast",
    settings: CollectSettings | None = None,
    **options: Unpack[CollectOptions],
) -> nn.Module:
    """Start the adapter of a trainer that is built, on the trainer's own batches: then call ``train()``.

    Args:
        trainer: a ``transformers.Trainer`` or ``Seq2SeqTrainer``, one of TRL's (SFT, DPO, KTO, ORPO, Reward,
            GRPO, RLOO), of sentence-transformers, or one of your own made of these. Its model has a LoRA
            adapter, made by ``peft_config=...``, ``peft.get_peft_model`` or ``model.add_adapter``. Batches
            come from its own loader with its own collator; for GRPO and RLOO the base model answers the
            prompts, and the trainer's rewards score the answers.
        method: how to find the start. Default: ``lorainit.Auto()``.
        loss: ``"model"``: the model's own loss of every sequence; ``"trainer"``: ``trainer.compute_loss``,
            where a batch is one unit that is never cut, and counts as many examples (sequences, pairs) as
            it holds. Default: ``"model"`` where that is what the trainer minimizes, else ``"trainer"``; the
            log says which.
        adapter_name: of the adapter to start. Default: the active one.
        set_learning_rate: measure a learning rate with the start, as `suggest_learning_rate` does, where the
            trainer has its class's default and no optimizer yet, and give it to the trainer; the log says it.
            Not for on-policy trainers nor for those of preferences, where a default that stays is warned of;
            nor for methods that read no data.
        match_learning_rate: leave the trainer's learning rate as it is, and resize the factors and
            ``lora_alpha`` so that it does what the suggested one would (``learning_rate`` of
            `get_peft_model`); then `set_learning_rate` is without effect.
        reference_weights: see `get_peft_model`.
        calibration_share: see `get_peft_model`.
        fit_heads: see `get_peft_model`.
        precision: see `get_peft_model`.
        settings: how statistics are collected, see `CollectSettings`; ``max_sequences`` counts examples.
        **options: its fields, as keywords. A ``loss_fn`` of your own takes the trainer's batches.

    Returns:
        The model that has the adapter: the trainer's own, or the transformer inside it. The trainer's
        counters, metrics and generators are as they were, so that it trains as if it had been built with the
        started adapter.

    Raises:
        AdapterError: no adapter; training has begun; an optimizer exists that does not hold the
            adapter's parameters; or a learning rate is to be matched for a loss of which none can be suggested.
        DataError: batches that cannot be measured; on-policy data without any advantage.
        LorainitError: see `get_peft_model`; the model is as it was.
    """
    check_trainer(trainer)
    method = Auto() if method is None else method
    settings = settings_with(settings, options, "start_trainer")
    model, name = adapter_of(trainer, adapter_name)
    check_optimizer(trainer, model, name)
    kind = _loss(trainer, loss, settings)
    judged = has_judged_rate(trainer)
    matched = rate_to_match(trainer, judged=judged) if match_learning_rate else None
    needs_data = bool(getattr(method, "needs", True)) or match_learning_rate
    if needs_data:
        check_reference(model, name)
        _say_place(trainer, model)
    suggest_rate = needs_data and set_learning_rate and wants_rate(trainer) and judged
    with ExitStack() as stack:
        stack.enter_context(unchanged_rng(input_device(model)))
        stack.enter_context(unchanged_trainer(trainer))
        # On-policy trainers answer prompts in eval mode before anything is measured.
        stack.enter_context(unpacked(trainer.model))
        if model is not trainer.model:
            # What is around it does not learn or drop anything meanwhile either.
            stack.enter_context(measuring(trainer.model))
        data = None
        if needs_data:
            data = _data(trainer, model, kind, settings)
            if kind == "trainer":
                settings = replace(settings, loss_fn=TrainerLoss(trainer))
        started: nn.Module = get_peft_model(
            model,
            None,
            method=method,
            data=data,
            reference_weights=reference_weights,
            adapter_name=name,
            calibration_share=calibration_share,
            fit_heads=fit_heads,
            suggest_rate=suggest_rate,
            learning_rate=matched,
            precision=precision,
            settings=settings,
        )
    if match_learning_rate:
        # The start's line says it.
        return started
    if set_learning_rate and not judged:
        say_default_rate(trainer, progress=settings.progress)
    elif set_learning_rate:
        set_rate(trainer, suggested_rate(started, name), progress=settings.progress)
    return started


def _loss(trainer: Any, asked: str | None, settings: CollectSettings) -> str:
    """``"model"``, ``"trainer"``, or ``"user"`` where the settings hold a loss function."""
    if asked is not None and asked not in get_args(Loss):
        raise AdapterError(f"loss must be 'model' or 'trainer', got {asked!r}")
    if settings.loss_fn is not None:
        if asked is not None:
            raise AdapterError(
                f"loss={asked!r} and a loss_fn are two losses: leave one of them out."
            )
        return "user"
    kind = loss_of(trainer) if asked is None else asked
    if kind == "trainer" and settings.loss_reduction == "token":
        raise AdapterError(
            f"loss_reduction='token' counts labels, which the loss of {type(trainer).__name__} weighs in its "
            "own way: leave it out, or take loss='model'."
        )
    return kind


def _data(trainer: Any, model: nn.Module, kind: str, settings: CollectSettings) -> DrawnBatches:
    """The trainer's batches, each whole where its own loss is taken."""
    examples = partial(examples_in, trainer)

    def labelled(content: Any) -> int:
        batch = Batch.arrived(content, 0, own_loss=True)
        flags = labelled_units(model, batch) if batch.separable else [True]
        return sum(n for n, flag in zip(batch.unit_sequences, flags, strict=True) if flag)

    count = labelled if kind == "model" else examples
    with adapters_disabled(model):
        drawn = draw_batches(trainer, settings.max_sequences, count)
    if is_on_policy(trainer):
        check_advantages(drawn)
    source = (
        "what the base model answers to its prompts" if is_on_policy(trainer) else "its own batches"
    )
    whose = {"model": "the model's own loss", "trainer": "its own loss, batch by batch"}
    logger.info(
        "%s: %d of %s, %s",
        type(trainer).__name__,
        len(drawn),
        source,
        whose.get(kind, "your loss_fn"),
    )
    if kind == "trainer":
        drawn[:] = [Batch(content, whole=True, losses=examples(content)) for content in drawn]
    return drawn


def _say_place(trainer: Any, model: nn.Module) -> None:
    """Under FSDP the trainer moves its model to the accelerator only in ``train()``."""
    there = getattr(trainer.accelerator, "device", None)
    here = input_device(model)
    if there is not None and there.type != "cpu" and here.type == "cpu":
        logger.warning(
            "the trainer's model is still on the CPU and is measured there; trainer.model.to(%r) before "
            "start_trainer measures it on the accelerator",
            str(there),
        )
