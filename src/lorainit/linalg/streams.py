"""Work of one thread on several of a CUDA device's streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch

_made: dict[torch.device, list[torch.cuda.Stream]] = {}
"""The same ones every time: memory that was used on a stream is kept for it."""


@contextmanager
def concurrent_streams(
    device: torch.device, number: int
) -> Iterator[list[Callable[[], AbstractContextManager[object]]]]:
    """Contexts whose work need not wait for one another's.

    Their work begins after all that the current stream was given before, and what it is given next begins
    after theirs. On another device, or one alone, they do nothing.
    """
    if device.type != "cuda" or number < 2:
        yield [nullcontext]
        return
    here = torch.cuda.current_stream(device)
    made = _made.setdefault(device, [])
    while len(made) < number:
        made.append(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    streams = made[:number]
    for stream in streams:
        stream.wait_stream(here)
    try:
        yield [partial(torch.cuda.stream, stream) for stream in streams]
    finally:
        for stream in streams:
            here.wait_stream(stream)
