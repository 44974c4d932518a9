"""A trainer as it was: what its own code counts and keeps while it is asked for batches and losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_COUNTED = (
    "_metrics",
    "_stored_metrics",
    "_logs",
    "_step",
    "_buffered_inputs",
    "_total_train_tokens",
    "_pending_metrics",
    "_pending_extra_logs",
    "_entropy_window_stats",
    "_last_world_entropy",
    "_last_loaded_step",
    "_signature_columns",
    "accum_loss_components",
    "entropy_coef",
)
"""Attributes that TRL's and sentence-transformers' trainers change while they draw and compute a loss."""

_COLLECTIVE = ("gather", "gather_for_metrics", "reduce")


@contextmanager
def unchanged_trainer(trainer: Any) -> Iterator[None]:
    """Metrics, counters and buffers of the trainer, and its accelerator's loaders, are put back."""
    held = vars(trainer)
    before = {name: copy.deepcopy(held[name]) for name in _COUNTED if name in held}
    loaders = getattr(trainer.accelerator, "_dataloaders", [])
    known = len(loaders)
    try:
        yield
    finally:
        del loaders[known:]
        for name in _COUNTED:
            if name in before:
                held[name] = before[name]
            else:
                held.pop(name, None)


@contextmanager
def by_itself(accelerator: Any) -> Iterator[None]:
    """Losses do not wait for other processes, which may compute more of them or fewer.

    A trainer gathers its metrics from all processes whenever it computes a loss.
    """

    def local(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        return tensor

    held = vars(accelerator)
    before = {name: held[name] for name in _COLLECTIVE if name in held}
    held.update({name: local for name in _COLLECTIVE})
    try:
        yield
    finally:
        for name in _COLLECTIVE:
            del held[name]
        held.update(before)
