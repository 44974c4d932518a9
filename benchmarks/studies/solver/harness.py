"""Parts of the study one by one, each within its limit and recorded as it ends."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import json_lines
from benchmarks.common.clock import cleared, limited


class Study:
    """Runs parts one by one, each with its limit, and says what came out as it goes."""

    def __init__(self, device: torch.device, out: Path | None, end: float) -> None:
        self.device, self.out, self.end = device, out, end
        self.rank = 8

    def say(self, record: dict[str, Any]) -> None:
        json_lines.say(record, self.out)

    def run(self, name: str, work: Callable[[], dict[str, Any]], limit: int = 25) -> None:
        left = int(self.end - time.monotonic())
        if left < 3:
            print(f"{name}: no time left", flush=True)
            return
        begin = time.monotonic()
        try:
            with limited(min(limit, left)):
                found = work()
        except Exception as error:
            traceback.print_exc(limit=4)
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        self.say({"name": name, **found, "all": round(time.monotonic() - begin, 2)})
        cleared()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], Any], repeats: int = 5) -> Any:
        try:
            work()
            self.wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            self.wait()
            return round((time.perf_counter() - begin) / repeats * 1e3, 3)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:160]
