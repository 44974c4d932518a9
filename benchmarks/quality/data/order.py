"""Which rows of a pool a seed trains on, and in which order."""

from __future__ import annotations

import torch
from torch import Tensor


def training_rows(pool_size: int, samples: int, seed: int) -> Tensor:
    """``(samples,)`` rows of the training pool that a seed fine-tunes on, in its first order."""
    if samples > pool_size:
        raise ValueError(f"{samples} training samples were asked for; the pool has {pool_size}")
    generator = torch.Generator().manual_seed(10_007 + seed)
    return torch.randperm(pool_size, generator=generator)[:samples]


def batch_order(pool_size: int, samples: int, seed: int, steps: int, batch_size: int) -> Tensor:
    """``(steps, batch)`` rows of the training pool, every epoch reshuffled."""
    rows = training_rows(pool_size, samples, seed)
    generator = torch.Generator().manual_seed(20_011 + seed)
    parts, have = [rows], samples
    while have < steps * batch_size:
        parts.append(rows[torch.randperm(samples, generator=generator)])
        have += samples
    return torch.cat(parts)[: steps * batch_size].reshape(steps, batch_size)
