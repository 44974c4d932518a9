"""Statistics that are shared out over processes: a table of the whole, and one file of it.

The file is written by the first process, which holds one tensor at a time; the others send theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, balanced_owners
from lorainit.statistics.store.sharded_files import Entry, write


@dataclass(frozen=True)
class Shares:
    """How layers are shared out over processes.

    Attributes:
        owners: the rank that holds each layer, in the layers' order; the same on every process.
        rank: of this process.
        size: number of processes.
    """

    owners: Mapping[str, int]
    rank: int
    size: int


@dataclass(frozen=True)
class Table:
    """What all processes have together.

    Attributes:
        records: of all layers, as `records.layer_record` makes them, in the layers' order.
        slots: every tensor, shared ones once.
    """

    records: dict[str, dict[str, Any]]
    slots: list[Slot]


def table_of(
    records: Mapping[str, dict[str, Any]],
    described: Mapping[Any, tuple[tuple[int, ...], torch.dtype]],
    shares: Shares,
) -> Table:
    """The whole's table from each process's own records, and its tensors' shapes and dtypes."""
    merged: dict[str, dict[str, Any]] = {}
    slots = []
    for owner, (theirs, shapes) in enumerate(collectives.gather_objects((records, described))):
        merged |= theirs
        slots += [Slot(key, owner, shape, dtype) for key, (shape, dtype) in shapes.items()]
    return Table({name: merged[name] for name in shares.owners}, slots)


def shares_of(places: Mapping[str, Collection[str]], size_of: Callable[[str], int]) -> Shares:
    """About the same for every process; layers that share a tensor stay together.

    Args:
        places: by layer, the keys of its tensors.
        size_of: of a tensor, by key.
    """
    rank, size = collectives.world()
    leaders: dict[str, str] = {}
    leader: dict[str, str] = {}
    weights: dict[str, int] = {}
    for name, keys in places.items():
        first = next((leaders[key] for key in keys if key in leaders), name)
        leader[name] = first
        for key in keys:
            if key not in leaders:
                leaders[key] = first
                weights[first] = weights.get(first, 0) + size_of(key)
        weights.setdefault(first, 0)
    parts = balanced_owners(weights, size)
    return Shares({name: parts[leader[name]] for name in places}, rank, size)


def write_shared(
    path: Path,
    table: Table,
    tensors: Mapping[Any, Tensor],
    common: Mapping[str, Tensor],
    header: Mapping[str, str],
    max_bytes: int,
) -> None:
    """Files of every process's tensors, and of the `common` ones, which all have.

    Args:
        path: see `files.write`.
        table: of the whole.
        tensors: this process's own; each is asked for once.
        common: what the first process adds at the end.
        header: the files' metadata.
        max_bytes: of a file.

    Raises:
        OSError: on the first process, which writes; `ProcessError` on the others.
    """
    error: OSError | None = None
    arriving = _arriving(table, tensors, lambda: error is not None)
    if collectives.world()[0] == 0:
        entries = [Entry(str(slot.key), slot.shape, slot.dtype) for slot in table.slots]
        entries += [Entry(key, tuple(t.shape), t.dtype) for key, t in common.items()]
        try:
            write(path, entries, chain(arriving, common.values()), header, max_bytes)
        except OSError as caught:
            error = caught
    # Whoever does not write, or not any more, still gives its tensors until all have stopped.
    for _ in arriving:
        pass
    collectives.raise_everywhere(error)


def _arriving(
    table: Table, tensors: Mapping[Any, Tensor], failed: Callable[[], bool]
) -> Iterator[Tensor]:
    """On the first process each tensor in turn; the others give theirs, until one has `failed`."""
    rank, _ = collectives.world()
    for slot in table.slots:
        if collectives.any_process(failed()):
            return
        if rank == slot.owner:
            own = tensors[slot.key].contiguous()
            if rank == 0:
                yield own
            else:
                dist.send(own.to(collectives.communication_device(own.device)), 0)
        elif rank == 0:
            place = collectives.communication_device(torch.device("cpu"))
            arrived = torch.empty(slot.shape, dtype=slot.dtype, device=place)
            dist.recv(arrived, slot.owner)
            yield arrived
