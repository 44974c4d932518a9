"""Where a method's solves spend their time: every part waited for, within the parts that call it.

    python -m benchmarks.solve_parts lora_da natural --out parts.jsonl

One start of a Llama-2-7B shape from collected statistics of 64 x 256 tokens (``--shape``, ``--layers``),
after two that load libraries. Waiting for every part makes the whole slower; ``plain`` is without. One JSON
line a method: seconds and calls by the last three names of the call stack, inclusive.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorainit.solving
import torch

import lorainit.methods.lora_da
from benchmarks.timing import parts
from benchmarks.timing.cases import SHAPES, Case
from benchmarks.timing.clock import Clock, provenance
from benchmarks.timing.model import build
from lorainit import linalg
from lorainit.linalg import halves, subspace, triangle

WATCHED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (lorainit.solving, ("_solve_chunk", "_weights", "_without_gradient", "_check_factors", "relative_size")),
    (lorainit.methods.lora_da, ("_with_fewer_digits", "gram_of_lower", "lower_inverse")),
    (lorainit.methods.lora_da.LoraDA, ("_fisher", "_iterated")),
    (lorainit.methods.lora_da._Products, ("omega", "missed")),
    (
        linalg,
        ("damped_cholesky", "check_finite", "bound_of_operator", "smallest_of_operator", "top_singular",
         "largest_eigenvectors"),
    ),
    (triangle.Triangle, ("__init__", "solve", "solve_transposed", "solve_quickly", "inverse_quickly")),
    (halves.Halves, ("times", "transposed_times")),
    (halves.Leading, ("times", "transposed_times")),
    (subspace, ("filtered", "orthonormal", "_eigh")),
    (subspace._Filter, ("__init__", "__call__")),
)  # fmt: skip
_DEPTH = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", choices=sorted(parts.METHODS))
    parser.add_argument("--shape", default="llama-2-7b", choices=sorted(SHAPES))
    parser.add_argument(
        "--layers", type=int, default=0, help="decoder layers; default: the shape's"
    )
    parser.add_argument("--out", type=Path, help="JSON lines, added to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for method in options.methods:
        case = Case("solve parts", "start", options.shape, options.layers, 64, 256, method=method)
        record = {"method": method, "shape": options.shape} | measure(case, device)
        line = json.dumps(record | {"provenance": provenance(device)})
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of a start without watching, and of every part of one with."""
    model, clock = build(case.sizes(), device), Clock(device)
    parts.warm(case, model)
    found = parts.collected(case, model, clock)

    def start() -> dict[str, float]:
        own = Clock(device)
        parts.started(case, model, own, found, case.method)
        return own.seconds

    start()
    plain = start()
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    unwatched = _watch(clock.wait, seconds, calls)
    try:
        watched = start()
    finally:
        unwatched()
    return {"plain": plain, "watched": watched, "seconds": dict(seconds), "calls": dict(calls)}


def _watch(
    wait: Callable[[], None], seconds: dict[str, float], calls: Counter[str]
) -> Callable[[], None]:
    """Put a clock around everything in `WATCHED`; gives what takes them off."""
    stack: list[str] = []
    before = [(place, name, getattr(place, name)) for place, names in WATCHED for name in names]

    def timed(label: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            began = time.perf_counter()
            stack.append(label)
            key = "/".join(stack[-_DEPTH:])
            try:
                return work(*args, **kwargs)
            finally:
                wait()
                stack.pop()
                seconds[key] += time.perf_counter() - began
                calls[key] += 1

        return run

    for place, name, work in before:
        owner = f"{place.__name__}." if isinstance(place, type) else ""
        setattr(place, name, timed(owner + name, work))

    def off() -> None:
        for place, name, work in before:
            setattr(place, name, work)

    return off


if __name__ == "__main__":
    main()
