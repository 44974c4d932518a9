"""Seconds, memory and limits of a measurement."""

from __future__ import annotations

import contextlib
import gc
import inspect
import resource
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


class OverTimeError(Exception):
    """A part ran past its limit."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OverTimeError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Seconds of named stretches, the device drained at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stretch(self, name: str) -> Iterator[None]:
        self.wait()
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def watching(self, *places: tuple[str, Any, str]) -> Iterator[dict[str, list[Any]]]:
        """Stretches of functions and methods that others call: name, where, attribute.

        Gives what they returned.
        """
        results: dict[str, list[Any]] = defaultdict(list)

        def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                with self.stretch(name):
                    result = work(*args, **kwargs)
                # Statistics are freed while they are solved: only their size is kept.
                results[name].append(getattr(result, "nbytes", None))
                return result

            return timed

        with contextlib.ExitStack() as stack:
            for name, where, attribute in places:
                work = watched(name, getattr(where, attribute))
                static = isinstance(inspect.getattr_static(where, attribute), staticmethod)
                kept = staticmethod(work) if static else work
                stack.enter_context(mock.patch.object(where, attribute, kept))
            yield results


def cleared() -> None:
    """Give back what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float | None:
    """Largest allocation since `reset_peak`; unknown on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def host_peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
