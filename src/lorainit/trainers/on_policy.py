"""On-policy data: what the base model answers to the trainer's prompts, scored by the trainer's rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.errors import DataError
from lorainit.parallel import collectives

_FORWARD = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
"""What a batch holds for the model's forward beside tokens."""


def answered(trainer: Any, prompts: Any) -> list[dict[str, Any]]:
    """One rollout of the trainer's, as the batches that it would take its steps on.

    Args:
        trainer: GRPO's or RLOO's, whose model is the base (its adapters switched off).
        prompts: a batch of the trainer's own loader, for one rollout.

    Returns:
        ``steps_per_generation`` batches of completions with their advantages, the log-probabilities under the
        policy that drew them, and, where the loss compares with a reference, under that.
    """
    steps = int(trainer.args.steps_per_generation)
    trainer._buffered_inputs = None
    found = []
    with _training(trainer.model):
        for step in range(steps):
            trainer._step = step
            found.append(dict(trainer._prepare_inputs(prompts)))
    for batch in found:
        if "num_items_in_batch" in batch:
            # Of the whole rollout; a loss that is computed in eval mode divides by it as it stands.
            batch["num_items_in_batch"] = batch["num_items_in_batch"] / steps
        if "old_per_token_logps" not in batch and "old_logps" not in batch:
            batch["old_per_token_logps"] = _log_probabilities(trainer, batch)
    return found


def check_advantages(batches: Sequence[Any]) -> None:
    """Raise where no completion, on any process, is better or worse than the others of its prompt."""
    own = any(bool((batch["advantages"] != 0).any()) for batch in batches if "advantages" in batch)
    if not collectives.any_process(own):
        raise DataError(
            "no reward tells one completion from another of its prompt, so every advantage is zero and the "
            "policy has no gradient. Give more or easier prompts, a finer reward, or a higher max_sequences; "
            "or start from supervised data."
        )


@torch.no_grad()
def _log_probabilities(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """``(completions, length)``: without them the ratio to the old policy is one wherever the model is."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    rest = {name: batch[name] for name in _FORWARD if name in batch}
    with _mode(trainer.model, training=False):
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], **rest
        )
    logps: Tensor = found[0]
    return logps


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _training(model: nn.Module) -> Any:
    """Trainers tell by the model's mode whether they draw for training."""
    return _mode(model, training=True)
