"""Rank by layer under one budget: the strongest directions of all layers, wherever they are.

Which layer deserves rank is a question over all layers, so it is not part of a method's solve. The
method says what a direction is worth (EVA: its share of the inputs' variance; Natural: the decrease
of the loss that the quadratic model promises); this file counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rank_limits(
    configured: Mapping[str, int], possible: Mapping[str, int], rho: float
) -> dict[str, int]:
    """The most that each layer may get: `rho` times its configured rank, within what is possible.

    Args:
        configured: rank by layer.
        possible: ``min(out, in)``, or what the method allows, by layer.
        rho: at least 1.
    """
    return {n: max(1, min(int(rho * rank), possible[n])) for n, rank in configured.items()}


def allocate_ranks(
    values: Mapping[str, Tensor], configured: Mapping[str, int], *, minimum: int = 1
) -> dict[str, int]:
    """Give the sum of the configured ranks to the directions of most value.

    Args:
        values: by layer, ``(limit,)`` descending: what its directions are worth; its length is the
            most that the layer may get.
        configured: rank by layer; their sum is the budget.
        minimum: every layer keeps at least so many, so that none drops out of the adapter.

    Returns:
        Rank by layer, in the order of `configured`. The sum is the budget, or less where the limits
        do not allow that much. Ties go to the layer that comes first.

    References:
        Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance
        Adaptation", arXiv 2410.07170, section 3, for EVA's redistribution.
    """
    names = list(configured)
    ranks = {n: min(minimum, len(values[n])) for n in names}
    spare = sum(configured.values()) - sum(ranks.values())
    if spare <= 0:
        return ranks
    rest = [values[n][ranks[n] :].detach().double().cpu() for n in names]
    flat = torch.cat(rest) if rest else torch.empty(0)
    owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(rest)])
    # Values descend within a layer, so the best of all are a prefix of every layer's own.
    best = flat.argsort(descending=True, stable=True)[:spare]
    counts = torch.bincount(owner[best], minlength=len(names))
    return {n: ranks[n] + int(c) for n, c in zip(names, counts, strict=True)}
