"""How far layers move, as a share of their weights, and the length at which they move so far."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping

import torch

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.models.displacement import LowRank
from lorainit.parallel import collectives

FIRST_SIZE = 3e-3
"""Where the first search begins: this ``|Delta| / |W|``, median over the layers."""

UNMEASURED_SIZE = 1e-3
"""The ``|s B A| / |W|``, median over the layers, of a length that cannot be measured without data."""


def relative_sizes(terms: Mapping[str, LowRank], norms: Mapping[str, float]) -> dict[str, float]:
    """``|Delta|_F / |W|_F`` of every layer."""
    sizes = {}
    for name, term in terms.items():
        square = ((term.left.mT @ term.left) * (term.right @ term.right.mT)).sum().clamp_min(0)
        sizes[name] = float(square.sqrt()) / norms[name]
    return sizes


def length_for(sizes: Mapping[str, float], size: float) -> float:
    """The length at which the median layer moves by `size` of its weight's norm."""
    median = stats.median(sizes.values()) if sizes else 0.0
    # A search that began elsewhere on another process might end after another number of trials.
    return collectives.from_rank_zero(size / median if median > 0 else 1.0)


def weight_norms(targets: Mapping[str, Target]) -> dict[str, float]:
    """``|W|_F`` of every layer, above zero; sharded weights are read on every process."""
    norms = {}
    for name, target in targets.items():
        weight = read_weight(target.module, name)
        wide = torch.promote_types(weight.dtype, torch.float32)
        norms[name] = max(float(torch.linalg.vector_norm(weight, dtype=wide)), 1e-30)
    return norms
