"""What statistics will weigh, and in how many passes they are taken: known before any work.

The bytes of the statistics follow from the layers' shapes and from which layers read one input; what
a batch takes beside them is measured on one row (`lorainit.statistics.memory.peak`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorainit.errors import MemoryPlanError

_SHARE_OF_FREE = 0.95
"""Of the device memory that nobody holds; the rest is lost between allocations."""

_EASY_SHARE = 0.5
"""Statistics below this share of the free memory are taken in one pass without looking further."""

FIXED_POSITIONS = 1024
"""A batch takes the time of its positions and of so many more: weights and sums are read once a batch."""


@dataclass(frozen=True)
class BatchSize:
    """One way to run the batches.

    Attributes:
        rows: at once; None: the batches as they come.
        positions: of a batch.
        nbytes: activations, logits and gradients of a batch at their peak.
    """

    rows: int | None = None
    positions: int = 1
    nbytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Which layers each pass collects.

    Attributes:
        passes: names of target layers, in order, by pass.
        nbytes: bytes of all statistics together.
        largest: bytes of the heaviest pass's statistics.
        budget: bytes that everything on the device may take; None for no limit.
        held: bytes that are there before: the model, and whatever else.
        batch: how batches are run, and what they take.
        note: why the pass is not taken block by block, where that was looked at.
    """

    passes: tuple[tuple[str, ...], ...]
    nbytes: int
    largest: int
    budget: int | None = None
    held: int = 0
    batch: BatchSize = BatchSize()
    note: str = ""

    @property
    def cost(self) -> float:
        """Of its time: passes, each with what a batch takes whatever its size."""
        return len(self.passes) * (1 + FIXED_POSITIONS / self.batch.positions)

    @property
    def peak(self) -> int:
        """Bytes that everything will take at most."""
        return self.held + self.largest + self.batch.nbytes

    def __str__(self) -> str:
        """The choice in one line."""
        count = len(self.passes)
        line = f"statistics of {sum(map(len, self.passes))} layers: {gib(self.nbytes)}"
        if self.budget is None:
            return f"{line}, no limit: 1 pass"
        rows = "" if self.batch.rows is None else f", {self.batch.rows} rows at once"
        return (
            f"{line}, {gib(self.held)} held, {gib(self.batch.nbytes)} for a batch{rows}, at most "
            f"{gib(self.budget)}: {count} pass{'es' if count > 1 else ''}, peak {gib(self.peak)}"
            + (f"; not block by block: {self.note}" if self.note else "")
        )


class OneHotShape(tuple[int, int]):
    """``(out, words)`` of an embedding."""


def statistic_bytes(
    shape: tuple[int, int],
    needs: Collection[str],
    *,
    element: int = 4,
    gradient: int | None = None,
    one_hot: bool = False,
) -> dict[str, int]:
    """Bytes of each statistic of one ``(out, in)`` layer, by name.

    Args:
        shape: of the weight.
        needs: names of the statistics.
        element: bytes of a number: 4, or 8 where the model computes in float64.
        gradient: bytes of a number of the gradient, where that is another.
        one_hot: of words, whose second moment is one number each.
    """
    out, inner = shape
    sizes = {
        "gradient": out * inner,
        "input_second_moment": inner if one_hot or isinstance(shape, OneHotShape) else inner**2,
        "input_mean": inner,
        "output_second_moment": out * out,
        "output_second_moment_diagonal": out,
    }
    if "output_second_moment" in needs:
        # The full matrix serves the diagonal too.
        sizes["output_second_moment_diagonal"] = 0
    widths = {"gradient": gradient or element}
    return {name: size * widths.get(name, element) for name, size in sizes.items() if name in needs}


def total_bytes(
    shapes: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    *,
    shared: Sequence[Collection[str]] = (),
    element: int = 4,
    gradient: int | None = None,
) -> int:
    """Bytes of all layers' statistics; each group of `shared` layers reads one input."""
    weigher = Weigher(shapes, needs, shared, element, gradient)
    return sum(weigher.added(name) for name in shapes)


class Weigher:
    """Adds layers up; a shared input counts once, until `restart`."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        needs: Collection[str],
        shared: Sequence[Collection[str]],
        element: int,
        gradient: int | None,
    ) -> None:
        self.sizes = {
            name: statistic_bytes(shape, needs, element=element, gradient=gradient)
            for name, shape in shapes.items()
        }
        self.group = {name: index for index, group in enumerate(shared) for name in group}
        self.met: set[int] = set()

    def added(self, name: str) -> int:
        """What this layer adds to those before it."""
        sizes = self.sizes[name]
        total = sum(sizes.values())
        group = self.group.get(name)
        if group in self.met:
            total -= sizes.get("input_second_moment", 0) + sizes.get("input_mean", 0)
        if group is not None:
            self.met.add(group)
        return total

    def restart(self) -> None:
        """Nothing is there."""
        self.met.clear()


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    budget: int | None,
    *,
    shared: Sequence[Collection[str]] = (),
    element: int = 4,
    gradient: int | None = None,
    held: int = 0,
    batches: Sequence[BatchSize] = (BatchSize(),),
    strict: bool = False,
) -> Plan:
    """The quickest way within `budget` bytes: passes over groups of layers, in their order.

    Small batches leave room for more statistics, and so for fewer passes, but take longer for the
    same tokens. A pass's time is taken to be that of its positions and of a fixed number more a batch.

    Args:
        shapes: ``(out, in)`` by layer.
        needs: names of the statistics.
        budget: bytes for everything; None for no limit.
        shared: groups of layers that read one input.
        element: bytes of a number.
        gradient: bytes of a number of the gradient, where that is another.
        held: bytes that are there before.
        batches: ways to run the batches.
        strict: the budget is a promise, not a guess.

    Raises:
        MemoryPlanError: a strict budget is too small even for one layer a pass and the smallest batch.
    """
    nbytes = total_bytes(shapes, needs, shared=shared, element=element, gradient=gradient)
    if budget is None or not shapes:
        return Plan((tuple(shapes),), nbytes, nbytes, None, held, batches[0])
    weigher = Weigher(shapes, needs, shared, element, gradient)
    best: tuple[float, int, Plan] | None = None
    for batch in batches:
        room = budget - held - batch.nbytes
        groups, largest = packed(weigher, shapes, room)
        if largest > room:
            continue
        plan = Plan(groups, nbytes, largest, budget, held, batch)
        if best is None or (plan.cost, len(groups)) < best[:2]:
            best = plan.cost, len(groups), plan
    if best is not None:
        return best[2]
    smallest = min(batches, key=lambda batch: batch.nbytes)
    groups, largest = packed(weigher, shapes, 0)
    plan = Plan(groups, nbytes, largest, budget, held, smallest)
    if strict:
        raise MemoryPlanError(
            f"max_memory of {gib(budget)} is too small: {gib(held)} are held already (the model "
            f"above all), one row of a batch takes {gib(smallest.nbytes)} and the largest layer's "
            f"statistics {gib(largest)}. Allow {gib(plan.peak)}, or cut the sequences shorter."
        )
    return plan


def packed(
    weigher: Weigher, names: Collection[str], room: int
) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Groups of layers, each of at most `room` bytes or of one layer, and the heaviest's bytes."""
    groups: list[list[str]] = [[]]
    weights = [0]
    weigher.restart()
    for name in names:
        size = weigher.added(name)
        if groups[-1] and weights[-1] + size > room:
            groups.append([])
            weights.append(0)
            weigher.restart()
            size = weigher.added(name)
        groups[-1].append(name)
        weights[-1] += size
    return tuple(map(tuple, groups)), max(weights)


def default_budget(device: torch.device) -> int | None:
    """Bytes that everything on the device may take by default; no limit on the CPU."""
    if device.type != "cuda":
        return None
    reserved = torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved - torch.cuda.memory_allocated(device)
    return math.floor(free * _SHARE_OF_FREE) + torch.cuda.memory_allocated(device)


def is_easy(nbytes: int, budget: int, held: int) -> bool:
    """Whether so many bytes of statistics need no plan."""
    return nbytes <= (budget - held) * _EASY_SHARE


def gib(nbytes: int) -> str:
    """Bytes in words: in GiB, or in MiB below a hundredth of one."""
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**30 / 100 else f"{nbytes / 2**20:.3g} MiB"
