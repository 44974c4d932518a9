"""Statistics that are shared out over processes: a table of the whole, and one file of it.

The file is written by the first process, which holds one tensor at a time; the others send theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.statistics import distributed
from lorainit.statistics.travel import Slot, divide

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Their names in a safetensors header."""


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
    records: Mapping[str, dict[str, Any]], tensors: Mapping[Any, Tensor], shares: Shares
) -> Table:
    """The whole's table from each process's own records and tensors."""
    described = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    merged: dict[str, dict[str, Any]] = {}
    slots = []
    for owner, (theirs, shapes) in enumerate(distributed.gather_objects((records, described))):
        merged |= theirs
        slots += [Slot(key, owner, shape, dtype) for key, (shape, dtype) in shapes.items()]
    return Table({name: merged[name] for name in shares.owners}, slots)


def shares_of(places: Mapping[str, Collection[str]], size_of: Callable[[str], int]) -> Shares:
    """About the same for every process; layers that share a tensor stay together.

    Args:
        places: by layer, the keys of its tensors.
        size_of: of a tensor, by key.
    """
    rank, size = distributed.world()
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
    parts = divide(weights, size)
    return Shares({name: parts[leader[name]] for name in places}, rank, size)


def write_shared(
    path: Path,
    aside: Path,
    table: Table,
    tensors: Mapping[str, Tensor],
    common: Mapping[str, Tensor],
    header: Mapping[str, str],
) -> None:
    """One safetensors file of every process's tensors, and the `common` ones, which all have.

    Args:
        path: of the file.
        aside: written first, then renamed to `path`.
        table: of the whole.
        tensors: this process's own.
        common: what the first process adds at the end.
        header: the file's metadata.

    Raises:
        OSError: on the first process, which writes; `ProcessError` on the others.
    """
    error: OSError | None = None
    with contextlib.ExitStack() as stack:
        arriving = _arriving(table, tensors, lambda: error is not None)
        if distributed.world()[0] == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(aside.open("wb"))
                file.write(_header(table, common, header))
                for tensor in chain(arriving, common.values()):
                    _write(file, tensor)
                file.close()
                os.replace(aside, path)
            except OSError as caught:
                error = caught
        # Whoever does not write, or not any more, still gives its tensors until all have stopped.
        for _ in arriving:
            pass
    distributed.raise_together(error)


def _header(table: Table, common: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(header)}
    described = [(slot.key, slot.shape, slot.dtype) for slot in table.slots]
    described += [(key, tuple(t.shape), t.dtype) for key, t in common.items()]
    begin = 0
    for key, shape, dtype in described:
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        entries[str(key)] = {
            "dtype": _DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, tensor: Tensor) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(flat.numpy().data)


def _arriving(
    table: Table, tensors: Mapping[Any, Tensor], failed: Callable[[], bool]
) -> Iterator[Tensor]:
    """On the first process each tensor in turn; the others give theirs, until one has `failed`."""
    rank, _ = distributed.world()
    for slot in table.slots:
        if distributed.anywhere(failed()):
            return
        if rank == slot.owner:
            own = tensors[slot.key].contiguous()
            if rank == 0:
                yield own
            else:
                dist.send(own.to(distributed.communication_device(own.device)), 0)
        elif rank == 0:
            place = distributed.communication_device(torch.device("cpu"))
            arrived = torch.empty(slot.shape, dtype=slot.dtype, device=place)
            dist.recv(arrived, slot.owner)
            yield arrived
