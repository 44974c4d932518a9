"""What statistics will weigh, and in how many passes they are taken: known before any work.

The bytes follow from the layers' shapes. Which layers read one input is only known once it arrives,
so the plan counts every layer's own second moment: what is needed is that or less.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

_SHARE_OF_FREE = 0.7
"""Of the free device memory; the rest is for the activations of a batch."""


@dataclass(frozen=True)
class Plan:
    """Which layers each pass collects.

    Attributes:
        passes: names of target layers, in order, by pass.
        nbytes: bytes of all statistics together, if no inputs are shared.
        largest: bytes of the heaviest pass.
        budget: bytes that a pass may take; None for no limit.
        offload: each pass's statistics leave the device for the host.
    """

    passes: tuple[tuple[str, ...], ...]
    nbytes: int
    largest: int
    budget: int | None
    offload: bool

    def __str__(self) -> str:
        """The choice in one line."""
        limit = "no limit" if self.budget is None else f"at most {_gib(self.budget)} a pass"
        where = ", kept on the host" if self.offload else ""
        count = len(self.passes)
        return (
            f"statistics of {sum(map(len, self.passes))} layers: {_gib(self.nbytes)} or less, "
            f"{limit}: {count} pass{'es' if count > 1 else ''}{where}"
        )


def statistic_bytes(
    shape: tuple[int, int], needs: Collection[str], *, element: int = 4
) -> dict[str, int]:
    """Bytes of each statistic of one ``(out, in)`` layer, by name.

    Args:
        shape: of the weight.
        needs: names of the statistics.
        element: bytes of a number: 4, or 8 where the model computes in float64.
    """
    out, inner = shape
    sizes = {
        "gradient": out * inner,
        "input_second_moment": inner * inner,
        "input_mean": inner,
        "output_second_moment": out * out,
        "output_second_moment_diagonal": out,
    }
    if "output_second_moment" in needs:
        # The full matrix serves the diagonal too.
        sizes["output_second_moment_diagonal"] = 0
    return {name: size * element for name, size in sizes.items() if name in needs}


def total_bytes(
    shapes: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    *,
    shared: Sequence[Collection[str]] = (),
    element: int = 4,
) -> int:
    """Bytes of all layers' statistics; each group of `shared` layers reads one input."""
    sizes = {n: statistic_bytes(s, needs, element=element) for n, s in shapes.items()}
    total = sum(sum(layer.values()) for layer in sizes.values())
    for group in shared:
        for name in list(group)[1:]:
            total -= sizes[name].get("input_second_moment", 0) + sizes[name].get("input_mean", 0)
    return total


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    budget: int | None,
    *,
    element: int = 4,
) -> Plan:
    """As few passes as `budget` bytes allow, over groups of layers in their order.

    A layer that alone is above the budget gets a pass of its own.
    """
    sizes = {n: total_bytes({n: s}, needs, element=element) for n, s in shapes.items()}
    nbytes = sum(sizes.values())
    if budget is None or nbytes <= budget or not shapes:
        return Plan((tuple(shapes),), nbytes, nbytes, budget, offload=False)
    passes: list[list[str]] = [[]]
    weight = 0
    for name, size in sizes.items():
        if passes[-1] and weight + size > budget:
            passes.append([])
            weight = 0
        passes[-1].append(name)
        weight += size
    largest = max(sum(sizes[n] for n in group) for group in passes)
    return Plan(tuple(map(tuple, passes)), nbytes, largest, budget, offload=True)


def free_budget(device: torch.device) -> int | None:
    """Bytes that statistics may take by default: a share of what is free; no limit on the CPU."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return math.floor((torch.cuda.mem_get_info(device)[0] + held) * _SHARE_OF_FREE)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
