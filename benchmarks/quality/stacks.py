"""Which runs train at once, and on which rows."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.quality.data.order import batch_order
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.initialization import Initialised

STACK_LENGTH = 80
"""Longest sequences, in tokens, at which a full stack is trained at once; memory goes by tokens."""


def batch_rows_of(experiment: Experiment, pools: dict[str, Pool]) -> torch.Tensor:
    """Rows of the training pool, ``(steps, batch)``."""
    e = experiment
    return batch_order(len(pools["train"]), e.train_samples, e.seed, e.steps, e.batch_size)


def stack_for(pool: Pool, most: int) -> int:
    """How many adapters train at once on sequences of the pool's length."""
    size, length = most, pool.length
    while size > 1 and size * length > most * STACK_LENGTH:
        size //= 2
    return size


def statistics_batch(model: Any) -> int:
    """Sequences of one batch of the statistics: few large ones on a device, fewer where the words are many."""
    size = 128 if next(model.parameters()).is_cuda else 32
    return size // 4 if getattr(model.config, "vocab_size", 0) > 2**17 else size


def stack_key(experiment: Experiment, found: Initialised) -> tuple[Any, ...]:
    """Runs that can share a stack."""
    return (
        found.start.rank,
        found.start.anchored,
        found.start.resized,
        experiment.scaling,
        experiment.steps,
        experiment.batch_size,
        experiment.precision,
        experiment.warmup,
        experiment.clip,
    )
