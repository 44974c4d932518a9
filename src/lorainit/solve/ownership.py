"""Which process solves which layer, how many at once, and where its factors lie."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain

import torch

from lorainit.adapters.targets import Target
from lorainit.models.introspection import execution_device
from lorainit.parallel import collectives
from lorainit.parallel.exchange import balanced_owners
from lorainit.statistics import Statistics

logger = logging.getLogger("lorainit")


def layer_owners(targets: Mapping[str, Target], statistics: Statistics | None) -> dict[str, int]:
    """Which process solves each layer: the one that holds its statistics, or an even division."""
    if statistics is not None and statistics.shares is not None:
        return {name: statistics.shares.owners[name] for name in targets}
    weights = {}
    for name, target in targets.items():
        out, inner = target.spec.out_features, target.spec.in_features
        weights[name] = out * out + out * inner + inner * inner
    return balanced_owners(weights, collectives.world()[1])


def device_of(target: Target) -> torch.device:
    """Where a layer is solved: with its weight, or where that is used if it waits elsewhere."""
    tensors = chain(target.module.parameters(), target.module.buffers())
    found = next((t.device for t in tensors), torch.device("cpu"))
    if found.type != "meta":
        return found
    return execution_device(target.module) or torch.device("cpu")


def after_out_of_memory(
    targets: list[Target], device: torch.device
) -> tuple[list[list[Target]], torch.device]:
    """What to do about a solve that there was no memory for: half of it, or one layer on the CPU.

    Returns:
        The parts to solve, and where; it is said in the log.

    Raises:
        OutOfMemoryError: it is one layer on the CPU already.
    """
    name, spec, count = targets[0].name, targets[0].spec, len(targets)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    what = f"out of memory on {device} in the solve of {count} layer(s), '{name}' first"
    if count > 1:
        half = count // 2
        logger.warning("%s: %d and %d at once instead", what, half, count - half)
        return [targets[:half], targets[half:]], device
    if device.type == "cpu":
        raise torch.OutOfMemoryError(
            f"layer '{name}' of shape ({spec.out_features}, {spec.in_features}) cannot be solved in "
            "the memory there is, not alone and not on the CPU: leave it out with exclude_modules, or "
            "use a method that reads smaller statistics."
        )
    logger.warning("%s: on the CPU instead", what)
    return [targets], torch.device("cpu")
