"""The plan of a pass block by block: which of a block's layers at a time, and where the blocks' inputs wait."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorainit.statistics.blocks.calls import Chain
from lorainit.statistics.memory.plan import FIXED_POSITIONS, BatchSize, Weigher, gib, packed
from lorainit.statistics.memory.rehearsal import Rehearsal

_SLACK = 100
"""One part in so many of a budget is left free where a solve works beside the blocks' inputs."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """One pass block by block.

    Attributes:
        chain: the blocks.
        groups: places in the chain from the last to the first, each with names of layers whose sums
            are taken at once; a block stands here several times where all of its layers are too many.
        nbytes: bytes of all statistics together.
        largest: bytes of the heaviest group's statistics.
        budget: bytes that everything on the device may take.
        held: bytes that are there all along: the model, or a block's weights where they wait elsewhere, what
            else there was, sums of layers outside of blocks.
        batch: how batches are run; its bytes are those of the larger of the forward pass and a block's run.
        on_device: bytes of the blocks' inputs that wait there.
        on_host: bytes of those that wait on the host.
        cost: of its time, see `make_plan`.
        peak: bytes that everything on the device will take at most.
    """

    chain: Chain
    groups: tuple[tuple[int, tuple[str, ...]], ...]
    nbytes: int
    largest: int
    budget: int
    held: int
    batch: BatchSize
    on_device: int
    on_host: int
    cost: float
    peak: int

    def __str__(self) -> str:
        """The choice in one line."""
        rows = "" if self.batch.rows is None else f", {self.batch.rows} rows at once"
        host = "" if self.on_host == 0 else f" and {gib(self.on_host)} on the host"
        layers = sum(len(names) for _, names in self.groups) + len(self.chain.outside)
        count = len(self.chain.blocks)
        parts = "" if len(self.groups) == count else f" in {len(self.groups)} parts"
        return (
            f"statistics of {layers} layers: {gib(self.nbytes)}, {gib(self.held)} held, "
            f"{gib(self.batch.nbytes)} for a batch{rows}, at most {gib(self.budget)}: 1 pass block by "
            f"block, {count} blocks{parts}, whose inputs wait, {gib(self.on_device)} on the device{host}, "
            f"peak {gib(self.peak)}"
        )


def make_block_plan(
    shapes: Mapping[str, tuple[int, int]],
    needs: Collection[str],
    budget: int,
    rehearsal: Rehearsal,
    *,
    device: torch.device,
    positions: int,
    batches: Sequence[BatchSize],
    shared: Sequence[Collection[str]] = (),
    element: int = 4,
    gradient: int | None = None,
    held: int = 0,
    workspace: int = 0,
    backward: bool = True,
) -> BlockPlan | None:
    """The quickest way block by block within `budget` bytes; None where there is none.

    Args:
        shapes: ``(out, in)`` by layer.
        needs: names of the statistics.
        budget: bytes for everything on the device.
        rehearsal: the chain, and what it takes.
        device: of the model. Inputs of a model on the CPU have no other place to wait.
        positions: of all of a process's batches together.
        batches: ways to run the batches; their own bytes are not read.
        shared: groups of layers that read one input.
        element: bytes of a number.
        gradient: bytes of a number of the gradient, where that is another.
        held: bytes that are there before.
        workspace: bytes that are wanted beside a group's statistics once they are there, to solve them.
        backward: whether there is a backward pass.
    """
    chain, taken = rehearsal.chain, rehearsal.taken
    weigher = Weigher(shapes, needs, shared, element, gradient)
    nbytes = sum(weigher.added(name) for name in shapes)
    weigher.restart()
    held += sum(weigher.added(name) for name in chain.outside) + int(taken.others * positions)
    held += taken.weights
    waiting = int(taken.inputs * positions)
    passing = int(taken.gradients * positions)
    free = 0 if device.type == "cpu" else waiting
    best: BlockPlan | None = None
    for batch in batches:
        forward = passing + int(taken.forward * batch.positions)
        block = 2 * passing + int(taken.block * batch.positions)
        room = budget - held - (waiting - free) - block
        groups, largest = _groups(weigher, chain, room)
        beside = max(forward, block + largest)
        if largest > room or held + waiting - free + beside > budget:
            continue
        # A solve finds its own room, if it must; inputs make some for it where they can wait elsewhere.
        wanted = max(beside, passing + largest + workspace + budget // _SLACK)
        on_device = waiting - min(free, max(0, held + waiting + wanted - budget))
        again = 1 / 3 if backward else 1.0
        runs = again + len(groups) / len(chain.blocks)
        cost = runs * (1 + FIXED_POSITIONS / batch.positions)
        if best is None or cost < best.cost:
            size = BatchSize(batch.rows, batch.positions, max(forward, block))
            peak = held + on_device + beside
            best = BlockPlan(
                chain,
                groups,
                nbytes,
                largest,
                budget,
                held,
                size,
                on_device,
                waiting - on_device,
                cost,
                peak,
            )
    return best


def _groups(
    weigher: Weigher, chain: Chain, room: int
) -> tuple[tuple[tuple[int, tuple[str, ...]], ...], int]:
    """Each block's layers, in parts where `room` asks for it, from the last block on; the heaviest's bytes."""
    found: list[tuple[int, tuple[str, ...]]] = []
    largest = 0
    for place in reversed(range(len(chain.blocks))):
        parts, heaviest = packed(weigher, chain.layers[place], room)
        found += [(place, names) for names in parts]
        largest = max(largest, heaviest)
    return tuple(found), largest
