"""Which process solves which layer, and where its factors lie."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorainit.adapters.targets import Target
from lorainit.statistics import Statistics, distributed
from lorainit.statistics.travel import divide


def solvers(targets: Mapping[str, Target], statistics: Statistics | None) -> dict[str, int]:
    """Which process solves each layer: the one that holds its statistics, or an even division."""
    if statistics is not None and statistics.shares is not None:
        return {name: statistics.shares.owners[name] for name in targets}
    weights = {}
    for name, target in targets.items():
        out, inner = target.spec.out_features, target.spec.in_features
        weights[name] = out * out + out * inner + inner * inner
    return divide(weights, distributed.world()[1])


def device_of(target: Target) -> torch.device:
    """Where a layer's factors lie: with its weight, or on the CPU while that is elsewhere."""
    found = next((p.device for p in target.module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found
