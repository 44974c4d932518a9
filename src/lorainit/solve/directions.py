"""What each layer's directions are worth, where ranks follow from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, broadcast_from_owners
from lorainit.solve.ownership import device_of, layer_owners
from lorainit.solve.stacks import stack_bytes, stacks_of
from lorainit.solve.words import of_words, words_of
from lorainit.statistics import Statistics
from lorainit.types import LayerStatistics, RanksDirections


def value_directions(
    targets: Mapping[str, Target],
    statistics: Statistics,
    method: RanksDirections,
    limits: Mapping[str, int],
    max_memory: int | None = None,
) -> dict[str, Tensor]:
    """What each layer's leading directions are worth, ``(limit,)`` by name, the same everywhere."""
    rank, _ = collectives.world()
    owners = layer_owners(targets, statistics)
    found: dict[str, Tensor] = {}
    by_limit: dict[int, dict[str, Target]] = {}
    for name, target in targets.items():
        if owners[name] == rank:
            by_limit.setdefault(limits[name], {})[name] = target
    budget = stack_bytes(targets, method, max_memory)
    with torch.no_grad(), collectives.shared_errors():
        for limit, members in by_limit.items():
            for chunk in stacks_of(members, budget, method.needs):
                layers = [_of_layer(t, statistics, method, limit) for t in chunk]
                values = method.rank_values(LayerStatistics.stack(layers), limit)
                # In one dtype, so that all know what is coming.
                found |= {t.name: values[i].cpu().double() for i, t in enumerate(chunk)}
    slots = [Slot(n, owners[n], (limits[n],), torch.float64) for n in targets]
    broadcast_from_owners(found, slots, torch.device("cpu"))
    return {name: found[name] for name in targets}


def _of_layer(
    target: Target, statistics: Statistics, method: RanksDirections, limit: int
) -> LayerStatistics:
    """Only what the method reads, where the weight lies."""
    held = statistics[target.name].only(method.needs)
    return of_words(held, words_of(target, held, limit)).to(device=device_of(target))
