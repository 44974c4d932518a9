"""One process an entry, several at once, each with a limit of time and memory."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.architectures.entry import run_entry
from benchmarks.architectures.outcome import outcome

Entry = tuple[str, str]
GRACE = 10
"""Seconds after its limit that a process may take to say that it is late."""


@dataclass
class _Job:
    entry: Entry
    process: BaseProcess
    file: Path
    begun: float = field(default_factory=time.monotonic)


def run_all(
    entries: Iterable[Entry], *, jobs: int, seconds: float, gib: float
) -> Iterator[dict[str, Any]]:
    """Records in the order in which they are done.

    Processes are forked, so that the libraries are imported once; this process computes nothing.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(entries)[::-1], list[_Job]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                entry = waiting.pop()
                file = Path(folder) / f"{entry[0]}-{entry[1]}.json"
                process = context.Process(target=_child, args=(entry, file, seconds, gib))
                process.start()
                running.append(_Job(entry, process, file))
            for job in list(running):
                late = time.monotonic() - job.begun > seconds + GRACE
                if late:
                    job.process.kill()
                if late or not job.process.is_alive():
                    job.process.join()
                    running.remove(job)
                    yield _record(job)
            time.sleep(0.05)


def _record(job: _Job) -> dict[str, Any]:
    taken = round(time.monotonic() - job.begun, 2)
    if job.file.exists():
        record = json.loads(job.file.read_text(encoding="utf-8"))
    else:
        record = {"family": job.entry[0], "name": job.entry[1]}
        record["harness"] = f"the process ended with {job.process.exitcode}"
        record["outcome"] = outcome(record)
    return {**record, "seconds": taken}


def _child(entry: Entry, file: Path, seconds: float, gib: float) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), int(gib * 2**30)))
    with contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(int(seconds))
        record = run_entry(*entry)
        signal.alarm(0)
    file.write_text(json.dumps(record, default=str), encoding="utf-8")


def _late(*_: object) -> None:
    raise TimeoutError("the time limit of an entry")
