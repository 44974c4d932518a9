"""Many processes as one: counts are added, and an error anywhere is one everywhere.

Every function is a collective where a process group is up: all processes must call it. Without a
group, or inside `single_process`, each is a group of one and nothing travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.errors import ProcessError

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process counts as the only one, whatever process group is up."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` without a process group."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def communication_device(default: torch.device) -> torch.device:
    """Where a tensor must lie to travel: where it is, if the group's back end serves that."""
    if world()[1] == 1:
        return default
    # "cpu:gloo,cuda:nccl", or only one of them.
    served = [part.split(":")[0] for part in str(dist.get_backend_config()).split(",")]
    if default.type in served or not served[0]:
        return default
    kind = next((kind for kind in served if kind != "cpu"), "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


_CPU = torch.device("cpu")


# --- a few numbers, and errors ------------------------------------------------------------------


def gather_objects(value: object) -> list[Any]:
    """Every process's value, in rank order; just this one's without a process group."""
    _, size = world()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def sum_counts(counts: Sequence[float]) -> list[float]:
    """Each count added over all processes, the same to the last bit on all of them."""
    if world()[1] == 1:
        return [float(count) for count in counts]
    # Some accelerators have no float64, so each process's numbers are added in rank order here.
    return [float(sum(column)) for column in zip(*gather_objects(list(counts)), strict=True)]


def _maxima(values: Sequence[int]) -> list[int]:
    """The largest of each over all processes."""
    if world()[1] == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64, device=communication_device(_CPU))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def maximum(value: int) -> int:
    """The largest value of all processes."""
    return _maxima([value])[0]


def any_process(flag: bool) -> bool:
    """Whether it is so on some process."""
    return bool(_maxima([int(flag)])[0])


def every_process(flag: bool) -> bool:
    """Whether it is so on every process."""
    return not any_process(not flag)


def equal_everywhere(value: object) -> bool:
    """Whether every process has the same value, by a hash of its ``repr``."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=7).digest()
    number = int.from_bytes(digest, "little")
    most, least = _maxima([number, -number])
    return most == -least


def from_rank_zero(value: float) -> float:
    """Rank 0's value: where processes must take one path, none may trust its own rounding."""
    if world()[1] == 1:
        return value
    values: list[float] = [value]
    dist.broadcast_object_list(values, src=0)
    return float(values[0])


def mark_shared(error: BaseException) -> None:
    """Note that every process knows of this error: none of them waits for the others."""
    with suppress(AttributeError, TypeError):
        error._lorainit_shared = True  # type: ignore[attr-defined]


def raise_everywhere(error: BaseException | None) -> None:
    """Raise on every process if there is an error on any.

    Raises:
        ProcessError: another process failed; it names the process and its error. The process that
            failed raises its own.
    """
    rank, _ = world()
    if not any_process(error is not None):
        return
    said = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        mark_shared(error)
        raise error
    failed = [number for number, text in enumerate(said) if text is not None]
    others = f" (so did {len(failed) - 1} more)" if len(failed) > 1 else ""
    stopped = ProcessError(
        f"process {failed[0]} failed{others}, so process {rank} stops too: {said[failed[0]]}"
    )
    mark_shared(stopped)
    raise stopped


@contextmanager
def shared_errors() -> Iterator[None]:
    """Run the block on every process; if it fails on any, all raise. No collectives inside."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        # An interrupt too: the others would wait for ever.
        error = caught
    raise_everywhere(error)


def parts_of_cap(cap: int, available: Sequence[int], open_ended: Sequence[bool]) -> list[int]:
    """How many of `cap` sequences each process gives: equal shares, where it has them.

    Args:
        cap: over all processes.
        available: what each process is known to have.
        open_ended: whether it may have more.
    """
    given = [0] * len(available)
    left = cap
    growing = [i for i, has in enumerate(available) if has or open_ended[i]]
    while left and growing:
        each, extra = divmod(left, len(growing))
        for position, i in enumerate(growing):
            want = each + (1 if position < extra else 0)
            more = want if open_ended[i] else min(want, available[i] - given[i])
            given[i] += more
            left -= more
        growing = [i for i in growing if not open_ended[i] and given[i] < available[i]] + [
            i for i in growing if open_ended[i]
        ]
        growing.sort()
    return given


# --- tensors that one process has and all want ----------------------------------------------------


BUCKET_BYTES = 1 << 27
"""Tensors travel together up to this size; a larger one travels by itself."""


def broadcast(tensors: Sequence[Tensor], source: int) -> None:
    """Overwrite `tensors`, the same shapes and dtypes everywhere, with those of rank `source`."""
    if world()[1] == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        new = tensor.numel() * tensor.element_size()
        if bucket and size + new > BUCKET_BYTES:
            _broadcast(bucket, source)
            bucket, size = [], 0
        bucket.append(tensor)
        size += new
    if bucket:
        _broadcast(bucket, source)


def _broadcast(bucket: Sequence[Tensor], source: int) -> None:
    """As bytes, so that dtypes mix and each back end carries all of them."""
    place = communication_device(bucket[0].device)
    lengths = [tensor.numel() * tensor.element_size() for tensor in bucket]
    flat = torch.empty(sum(lengths), dtype=torch.uint8, device=place)
    own = world()[0] == source
    if own:
        for tensor, part in zip(bucket, torch.split(flat, lengths), strict=True):
            part.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
    dist.broadcast(flat, src=source)
    if own:
        return
    with torch.no_grad():
        for tensor, part in zip(bucket, torch.split(flat, lengths), strict=True):
            # A copy, since a part of the bucket may not lie on a boundary of the wider dtype.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
