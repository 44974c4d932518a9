"""Options of LoRA-DA's release that are off in its published run, and a doubt about its ``N``."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.types import LayerStatistics

FEW = 1000
"""A training set of fewer sequences than this is taken for a sample of one."""


def check_balance(balance: bool, calibrated: bool) -> None:
    """Raise ValueError where factors are to be split that are not the paper's."""
    if balance and calibrated:
        raise ValueError("balance splits the paper's factors: leave scale at 'paper'")


def median_damping(diagonal: Tensor, ratio: float | None, default: Tensor) -> Tensor:
    """``ratio`` times the median of each layer's ``diag(Sy)`` ``(..., out)``, above zero, ``(...)``.

    The release's ``output_damping_ratio``. Of an even number the lower median, as there. Without a
    ratio the `default`.
    """
    if ratio is None:
        return default
    return (ratio * diagonal.median(-1).values).clamp_min(torch.finfo(torch.float32).tiny)


def rescaled_variance(change: Tensor, z_factor: Tensor) -> Tensor:
    """``|D D^T|_F / |Z^-1|_F`` ``(...)``: the weight at which both terms are equally large.

    The release's ``normalize_variance_guidance``.

    Args:
        change: ``(..., in, out)``, ``D``.
        z_factor: ``(..., in, in)``, the lower Cholesky factor of ``Z``.
    """
    tall = change.shape[-2] >= change.shape[-1]
    gram = change.mT @ change if tall else change @ change.mT
    inverse = linalg.once(torch.cholesky_inverse, z_factor)
    ratio: Tensor = gram.norm(dim=(-2, -1)) / inverse.norm(dim=(-2, -1))
    return ratio


def balanced(subspace: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` of ``content subspace^T``, split by roots of its singular values.

    The release's ``balance_factors``.

    Args:
        subspace: ``(..., in, rank)``, orthonormal columns.
        content: ``(..., out, rank)``.
    """
    u, s, v = linalg.svd(content)
    u, v = linalg.fix_pair_signs(u, v)
    return linalg.split_evenly(u, s, subspace @ v)


def population(stated: float | None, statistics: LayerStatistics, like: Tensor) -> Tensor:
    """``N``, at least 1: as stated, or else what the statistics know."""
    known = statistics.population if stated is None else stated
    known = statistics.sequences if known is None else known
    return torch.as_tensor(known, dtype=like.dtype, device=like.device).clamp_min(1.0)


def doubt_of_few(population: Tensor) -> str | None:
    """What is said where ``N`` is so small that it may be a sample's size, not the training set's."""
    number = float(population.max())
    if number >= FEW:
        return None
    return (
        f"LoRA-DA: N, the size of the training set, is taken to be {number:.0f}, the number of sequences "
        "given. If you will train on more, say so: LoraDA(population=...) or LoraDA.paper(population=...). "
        f"The published N is 100000; the variance term is {100_000 / number:.0f} times heavier here."
    )
