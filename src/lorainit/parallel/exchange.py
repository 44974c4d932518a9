"""Tensors on their way between all processes and the one that owns each of them.

Every tensor has an owner. Those of all owners travel at once: a buffer has one segment for each
owner, filled with as many whole rows of its tensors as fit, so that all links are used both ways and
no buffer has the size of a matrix. While one buffer travels, the next is packed. Of a folded sum
only the block triangle travels, 5/8 of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.linalg.block_triangle import FOLD_FROM, panels
from lorainit.parallel import collectives

BUFFER_BYTES = 1 << 28
"""A buffer's size, all segments together."""

SEGMENT_BYTES = 1 << 21
"""A segment is no smaller, however many owners there are: each costs a copy."""


@dataclass(frozen=True)
class Slot:
    """A tensor that travels, known by its key on every process, whether it is there or not.

    Attributes:
        key: in the processes' dictionaries of tensors.
        owner: rank of the process that owns it.
        shape: with at least one dimension.
        dtype: the same everywhere.
        folded: a square sum of `accumulators.add_gram`, of which what lies below the block triangle
            is neither read nor written.
    """

    key: Hashable
    owner: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    folded: bool = False

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """All rows of all leading dimensions."""
        count = 1
        for n in self.shape[:-1]:
            count *= n
        return count

    def strips(self) -> list[tuple[int, int, int]]:
        """First row, row after the last, and first column of each part that travels."""
        if not self.folded or self.columns < FOLD_FROM:
            return [(0, self.rows, 0)]
        return [(low, high, low) for low, high in panels(self.columns)]


class _Strip(NamedTuple):
    slot: Slot
    low: int
    high: int
    left: int

    @property
    def length(self) -> int:
        return (self.high - self.low) * (self.slot.columns - self.left)

    @property
    def last(self) -> bool:
        return self.high == self.slot.rows

    def of(self, tensor: Tensor) -> Tensor:
        """Its part of the tensor, a view."""
        return tensor.view(-1, self.slot.columns)[self.low : self.high, self.left :]


class _Round(NamedTuple):
    """What one buffer carries: each owner's strips, in segments of `length` elements."""

    dtype: torch.dtype
    length: int
    segments: tuple[list[_Strip], ...]


def balanced_owners(weights: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of `parts` gets each: the heaviest first, each to the part that has least so far."""
    heap = [(0, part) for part in range(parts)]
    found = {}
    for name in sorted(weights, key=lambda n: -weights[n]):
        load, part = heapq.heappop(heap)
        found[name] = part
        heapq.heappush(heap, (load + weights[name], part))
    return found


def reduce_to_owners(
    tensors: MutableMapping[Any, Tensor], slots: Sequence[Slot], device: torch.device
) -> None:
    """Each slot's sum over all processes, at its owner alone; every other process's part is freed.

    Args:
        tensors: by key, changed in place; what is missing counts as zero.
        slots: the same on every process.
        device: where the sum of a tensor is put that its owner has no part of.
    """
    rank, size = collectives.world()
    if size == 1:
        return
    place = collectives.communication_device(device)

    def begin(turn: _Round) -> tuple[Any, Callable[[], None]]:
        flat = torch.empty(size, turn.length, dtype=turn.dtype, device=place)
        for owner, strips in enumerate(turn.segments):
            _pack(strips, tensors, flat[owner])
            for strip in strips:
                if strip.last and owner != rank:
                    tensors.pop(strip.slot.key, None)
        own = torch.empty(turn.length, dtype=turn.dtype, device=place)
        work = _collective("reduce_scatter")(own, flat.view(-1), async_op=True)
        kept = [flat]  # until it has travelled

        def end() -> None:
            kept.clear()
            _unpack(turn.segments[rank], own, tensors, device)

        return work, end

    _overlapped(_rounds(slots, size), begin)


def broadcast_from_owners(
    tensors: MutableMapping[Any, Tensor], slots: Sequence[Slot], device: torch.device
) -> None:
    """Each slot's tensor on every process, the same to the last bit as its owner's.

    Args:
        tensors: by key, filled in place; the owners' must be there.
        slots: the same on every process.
        device: where the tensors of others are put.
    """
    rank, size = collectives.world()
    if size == 1:
        return
    place = collectives.communication_device(device)

    def begin(turn: _Round) -> tuple[Any, Callable[[], None]]:
        own = torch.empty(turn.length, dtype=turn.dtype, device=place)
        _pack(turn.segments[rank], tensors, own)
        flat = torch.empty(size, turn.length, dtype=turn.dtype, device=place)
        work = _collective("all_gather")(flat.view(-1), own, async_op=True)
        kept = [own]

        def end() -> None:
            kept.clear()
            for owner, strips in enumerate(turn.segments):
                if owner != rank:
                    _unpack(strips, flat[owner], tensors, device)

        return work, end

    _overlapped(_rounds(slots, size), begin)


def _collective(name: str) -> Callable[..., Any]:
    """PyTorch 2.13 gave these other names."""
    old = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}
    found: Callable[..., Any] = getattr(dist, f"{name}_single", None) or getattr(dist, old[name])
    return found


def _overlapped(
    rounds: Iterator[_Round], begin: Callable[[_Round], tuple[Any, Callable[[], None]]]
) -> None:
    """Pack and send each round; take what the one before brought while this one travels."""
    travelling: tuple[Any, Callable[[], None]] | None = None
    for turn in rounds:
        now = begin(turn)
        if travelling is not None:
            travelling[0].wait()
            travelling[1]()
        travelling = now
    if travelling is not None:
        travelling[0].wait()
        travelling[1]()


def _pack(strips: Sequence[_Strip], tensors: MutableMapping[Any, Tensor], flat: Tensor) -> None:
    for strip, part in _parts(strips, flat):
        tensor = tensors.get(strip.slot.key)
        if tensor is None:
            part.zero_()
            continue
        if not tensor.is_contiguous():
            tensor = tensors[strip.slot.key] = tensor.contiguous()
        part.copy_(strip.of(tensor))


def _unpack(
    strips: Sequence[_Strip],
    flat: Tensor,
    tensors: MutableMapping[Any, Tensor],
    device: torch.device,
) -> None:
    for strip, part in _parts(strips, flat):
        slot = strip.slot
        tensor = tensors.get(slot.key)
        if tensor is None:
            tensor = tensors[slot.key] = torch.empty(slot.shape, dtype=slot.dtype, device=device)
        strip.of(tensor).copy_(part)


def _parts(strips: Sequence[_Strip], flat: Tensor) -> Iterator[tuple[_Strip, Tensor]]:
    """Each strip's part of a segment, in the strip's shape."""
    first = 0
    for strip in strips:
        yield strip, flat[first : first + strip.length].view(strip.high - strip.low, -1)
        first += strip.length


def _rounds(slots: Sequence[Slot], size: int) -> Iterator[_Round]:
    """The same on every process that has the same slots."""
    groups: dict[torch.dtype, list[list[Slot]]] = {}
    for slot in slots:
        owned = groups.setdefault(slot.dtype, [[] for _ in range(size)])
        owned[slot.owner].append(slot)
    for dtype, owned in groups.items():
        nbytes = max(BUFFER_BYTES // size, SEGMENT_BYTES)
        widest = max(slot.columns for some in owned for slot in some)
        room = max(nbytes // dtype.itemsize, widest)
        for segments in zip_longest(*(_segments(some, room) for some in owned), fillvalue=[]):
            length = max(sum(strip.length for strip in strips) for strips in segments)
            yield _Round(dtype, length, segments)


def _segments(slots: Sequence[Slot], room: int) -> Iterator[list[_Strip]]:
    """The slots' strips, cut between rows to fill segments of at most `room` elements."""
    segment: list[_Strip] = []
    left_over = room
    for slot in slots:
        for low, high, left in slot.strips():
            width, row = slot.columns - left, low
            while row < high:
                count = min(high - row, left_over // width)
                if count == 0:
                    yield segment
                    segment, left_over = [], room
                    continue
                segment.append(_Strip(slot, row, row + count, left))
                left_over -= count * width
                row += count
    if segment:
        yield segment
