"""Ranks from what each layer is worth to a method, where that is a question of its weight too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import part_of_gather, read_weight
from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, broadcast_from_owners
from lorainit.solve.ownership import layer_owners
from lorainit.solve.words import narrowed
from lorainit.statistics import Statistics
from lorainit.types import RanksLayers


def ranks_by_importance(
    targets: Mapping[str, Target], statistics: Statistics, method: RanksLayers
) -> dict[str, int]:
    """The method's `ranks` from its `importance` of every layer, the same on every process.

    Each process asks about the layers whose statistics it holds; sharded weights are gathered by all,
    one at a time.
    """
    rank, _ = collectives.world()
    owners = layer_owners(targets, statistics)
    found: dict[str, Tensor] = {}
    failure: Exception | None = None
    with torch.no_grad():
        for name, target in targets.items():
            try:
                if owners[name] != rank:
                    part_of_gather(target.module)
                    continue
                weight = read_weight(target.module, name)
                layer = statistics[name].only(method.needs).to(device=weight.device)
                (_,), (weight,), (layer,), _ = narrowed([target], [weight], [layer], 1)
                found[name] = method.importance(weight, layer).cpu().double().reshape(1)
            except Exception as error:
                # The others go on gathering, and this process with them.
                failure = failure or error
    collectives.raise_everywhere(failure)
    slots = [Slot(n, owners[n], (1,), torch.float64) for n in targets]
    broadcast_from_owners(found, slots, torch.device("cpu"))
    importance = {name: float(found[name]) for name in targets}
    return method.ranks(importance, {name: target.spec for name, target in targets.items()})
