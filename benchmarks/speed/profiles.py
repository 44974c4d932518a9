"""Where a pass and its solves spend their time, by kernel."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.clock import Clock
from benchmarks.common.decoder import Case, batches_of, floor
from benchmarks.common.package_internals import SUMS
from benchmarks.speed.starts import collected, started, warm


def run_profile(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """Where a pass and its solves spend their time, by kernel; and what the Grams take."""
    few = replace(case, sequences=3 * case.batch)
    warm(few, model)
    with grams(clock.device) as spent:
        collected(few, model, clock)
    clock.seconds.pop("pass")
    known: dict[str, Any] = {"grams_ms": spent()}
    with profile(activities=activities(clock.device)) as trace:
        found = collected(few, model, clock)
    known["pass_ms"] = kernel_table(trace, clock.device)
    with profile(activities=activities(clock.device)) as trace:
        started(few, model, clock, found, few.method)
    known["solve_ms"] = kernel_table(trace, clock.device)
    return known


def run_profile_floor(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """The same, of the floor."""
    few = replace(case, sequences=3 * case.batch)
    model.requires_grad_(True)
    try:
        floor(model, batches_of(few)[:1], clock.device)
        with profile(activities=activities(clock.device)) as trace, clock.stretch("floor"):
            floor(model, batches_of(few), clock.device)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    return {"floor_ms": kernel_table(trace, clock.device)}


def activities(device: torch.device) -> list[ProfilerActivity]:
    only = [ProfilerActivity.CPU]
    return [*only, ProfilerActivity.CUDA] if device.type == "cuda" else only


def kernel_table(trace: profile, device: torch.device) -> dict[str, Any]:
    """The heaviest kernels, ``[milliseconds, calls]``, and the sum over all."""

    def spent(event: Any) -> float:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        return float(own) / 1e3

    rows = sorted(trace.key_averages(), key=spent, reverse=True)
    top = {event.key[:90]: [round(spent(event), 3), event.count] for event in rows[:14]}
    return {"all": round(sum(map(spent, rows)), 3), **top}


@contextlib.contextmanager
def grams(device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Milliseconds in each kind of sum, by events that nothing waits for."""
    marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = mark()
            result = work(*args)
            marks[name].append((begin, mark()))
            return result

        return timed

    def spent() -> dict[str, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return {n: sum(a.elapsed_time(b) for a, b in pairs) for n, pairs in marks.items()}
        return {n: sum(b - a for a, b in pairs) * 1e3 for n, pairs in marks.items()}

    with contextlib.ExitStack() as stack:
        for where, name in SUMS:
            work = watched(name, getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, work))
        yield spent
