"""Where a method's solves spend their time: every function of the package waited for, within its callers.

    python -m benchmarks.studies.solve_profile lora_da natural --out solve_profile.jsonl

One start of a Llama-2-7B shape from collected statistics of 64 x 256 tokens (``--shape``, ``--layers``),
after two that load libraries. Waiting for every part makes the whole slower; ``plain`` is without. One JSON
line a method: seconds and calls by the last three names of the call stack, inclusive. The kept lines are
of a list of functions, not of all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lorainit
from benchmarks.common import json_lines
from benchmarks.common.clock import Clock
from benchmarks.common.decoder import SHAPES, Case, build
from benchmarks.common.provenance import provenance
from benchmarks.speed.starts import METHODS, collected, started, warm

PACKAGE = str(Path(lorainit.__file__).parent)
DEPTH = 3
LEAST_SHARE = 1e-3
"""Of the watched seconds, below which a line is left out."""


class PackageProfile:
    """Seconds and calls of the package's functions inside the context, the device drained at both ends.

    Args:
        wait: drains the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open: list[tuple[str, float]] = []

    def __enter__(self) -> PackageProfile:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name.startswith("<"):
            return  # a comprehension or a lambda: its caller's
        self.wait()
        now = time.perf_counter()
        if event == "call":
            self._open.append((code.co_qualname, now))
        elif self._open:
            key = "/".join(name for name, _ in self._open[-DEPTH:])
            self.seconds[key] += now - self._open.pop()[1]
            self.calls[key] += 1


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of a start without watching, and of every part of one with."""
    model, clock = build(case.sizes(), device), Clock(device)
    warm(case, model)
    found = collected(case, model, clock)

    def start() -> dict[str, float]:
        own = Clock(device)
        started(case, model, own, found, case.method)
        return own.seconds

    start()
    plain = start()
    with PackageProfile(clock.wait) as profile:
        watched = start()
    least = LEAST_SHARE * sum(watched.values())
    kept = {key: spent for key, spent in profile.seconds.items() if spent >= least}
    calls = {key: profile.calls[key] for key in kept}
    return {"plain": plain, "watched": watched, "seconds": kept, "calls": calls}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+", choices=sorted(METHODS))
    parser.add_argument("--shape", default="llama-2-7b", choices=sorted(SHAPES))
    parser.add_argument(
        "--layers", type=int, default=0, help="decoder layers; default: the shape's"
    )
    parser.add_argument("--out", type=Path, help="JSON lines, added to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for method in options.methods:
        case = Case("solve profile", "start", options.shape, options.layers, 64, 256, method=method)
        record = {"method": method, "shape": options.shape} | measure(case, device)
        json_lines.say(record | {"provenance": provenance(device)}, options.out)


if __name__ == "__main__":
    main()
