"""Processes that enter a function together, with the same arguments, and leave it together."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lorainit.errors import ProcessError
from lorainit.parallel import collectives

_SHOWN = 160
_MOMENT = 3.0
"""Seconds that a process waits for the others to fail too."""

_calls = itertools.count()
"""Every process makes the same calls in the same order."""


@contextlib.contextmanager
def agreed() -> Iterator[dict[str, object]]:
    """Check arguments in the block, on every process, before anything else travels between them.

    What the block puts into the dictionary must be the same everywhere: texts, numbers, or what has a
    telling ``repr``. An error in the block on any process is one on all.

    Raises:
        ProcessError: another process failed in its block, or has other values.
    """
    facts: dict[str, object] = {}
    error: BaseException | None = None
    try:
        yield facts
    except BaseException as caught:
        if collectives.world()[1] == 1:
            raise
        error = caught
    rank, size = collectives.world()
    if size == 1:
        return
    said = None if error is None else f"{type(error).__name__}: {error}"
    own = {name: repr(value) for name, value in facts.items()}
    every = collectives.gather_objects((said, own))
    if error is not None:
        collectives.mark_shared(error)
        raise error
    for number, (failure, _) in enumerate(every):
        if failure is not None:
            stopped = ProcessError(
                f"process {number} failed, so process {rank} stops too: {failure}"
            )
            collectives.mark_shared(stopped)
            raise stopped
    first = every[0][1]
    for number, (_, theirs) in enumerate(every):
        for name in [*first, *theirs]:
            here, there = first.get(name, "nothing"), theirs.get(name, "nothing")
            if here != there:
                here, there = _difference(here, there)
                odd = ProcessError(
                    f"the processes do not agree on the {name}: process 0 has {here}, process {number} "
                    f"has {there}. Call it with the same arguments on all of them."
                )
                collectives.mark_shared(odd)
                raise odd


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """Let no process wait for one that failed by itself, or was interrupted.

    An error that the processes have not told each other leaves the others in a collective that never
    comes. So a process that failed writes its reason into the group's store, and looks for a moment
    whether all others have failed too. Where they have not, they wait: it closes its connections, theirs
    break, and they raise its reason. The process group is of no use then.

    Raises:
        ProcessError: the connection to a process that failed broke.
    """
    number = next(_calls)
    try:
        yield
    except BaseException as error:
        if collectives.world()[1] == 1 or getattr(error, "_lorainit_shared", False):
            raise
        rank, size = collectives.world()
        reasons = _reasons(number, size)
        with contextlib.suppress(Exception):
            text = f"process {rank} failed ({type(error).__name__}: {error})"
            # One that a broken connection has ended passes on the reason it was given.
            text = reasons[0] if reasons else text
            _store().set(_key(number, rank), text[:1000])
        if reasons and isinstance(error, RuntimeError):
            raise ProcessError(f"{reasons[0]}, so process {rank} stops too") from error
        if not _all_failed(number, size):
            with contextlib.suppress(Exception):
                # Its own thread of NCCL would wait for the others: end it, not wait.
                abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
                (abort or dist.destroy_process_group)()
        raise


def _key(number: int, rank: int) -> str:
    return f"lorainit/failed/{number}/{rank}"


def _reasons(number: int, size: int) -> list[str]:
    """What processes that failed have left, in rank order."""
    found = []
    with contextlib.suppress(Exception):
        store = _store()
        for key in (_key(number, rank) for rank in range(size)):
            if store.check([key]):
                found.append(str(store.get(key).decode()))
    return found


def _all_failed(number: int, size: int) -> bool:
    """Whether every process has failed within a moment."""
    end = time.monotonic() + _MOMENT
    while len(_reasons(number, size)) < size:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _difference(first: str, second: str) -> tuple[str, str]:
    """Both values from shortly before the place where they part."""
    if max(len(first), len(second)) <= _SHOWN:
        return first, second
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    begin = max(0, place - _SHOWN // 2)
    dots = "..." if begin else ""
    return dots + first[begin : begin + _SHOWN], dots + second[begin : begin + _SHOWN]
