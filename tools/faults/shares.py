"""The work in shares, one process each; what hangs or dies is a fault that was not survived."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        kinds: of ``sites``, ``kills``, ``mutations``.
        records: folder of the records, one file for each kind and share.
        seed: of every draw.
        only: names of operations; empty: all.
        count: mutations of each kind of file.
        begun: when this run began, in seconds since the epoch.
    """

    kinds: tuple[str, ...]
    records: Path
    seed: int
    only: tuple[str, ...]
    count: int
    begun: float

    def arguments(self) -> list[str]:
        """The same on a command line."""
        only = ["--only", *self.only] if self.only else []
        return [
            *self.kinds, "--records", str(self.records), "--seed", str(self.seed),
            "--count", str(self.count), "--begun", str(self.begun), *only,
        ]  # fmt: skip

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every record there is; a line that was cut off counts as not there."""
        for path in sorted(self.records.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def last(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The last record of every fault: what was not survived is tried again by the next run."""
        lines = sorted(self.lines(), key=lambda line: line["at"])
        return {(line["kind"], line["key"]): line for line in lines}

    def at_work(self, share: int) -> Path:
        """Holds the kind and key of the fault that a share is at; empty when it is done."""
        return self.records / f"share-{share}.now"


def write_record(plan: Plan, share: int, **values: Any) -> None:
    """One line more."""
    values["at"] = round(time.time(), 1)
    with (plan.records / f"{values['kind']}-{share}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def run_shares(plan: Plan, jobs: int, time_limit: float, hang: float) -> bool:
    """Run all shares to their end, or until the time is over; whether they came to their end."""
    plan.records.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + time_limit
    stopped = False
    running = {share: _start(plan, share, jobs) for share in range(jobs)}
    try:
        while running and time.monotonic() < end:
            time.sleep(0.5)
            for share, process in list(running.items()):
                code = process.poll()
                now = plan.at_work(share)
                if code == 0:
                    del running[share]
                    continue
                # Whole runs, which come before the first fault of an operation, take longer.
                most = hang if now.read_text() else 5 * hang
                hangs = code is None and time.time() - now.stat().st_mtime > most
                if code is None and not hangs:
                    continue
                process.kill()
                process.wait()
                what = f"hangs for {most:g} s" if hangs else f"its process died ({code})"
                between = f"{plan.kinds[0]}\tshare {share} | between two faults, see its log"
                kind, key = (now.read_text() or between).split("\t")
                write_record(plan, share, kind=kind, key=key, result="not survived", what=[what])
                if now.read_text():
                    running[share] = _start(plan, share, jobs)
                else:
                    del running[share]
                    stopped = True
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return not running and not stopped


def _start(plan: Plan, share: int, jobs: int) -> subprocess.Popen[bytes]:
    plan.at_work(share).write_text("")
    settings = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (plan.records / f"share-{share}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.faults", *plan.arguments(), "--share", f"{share}/{jobs}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
        )


def summary(plan: Plan) -> int:
    """Print the figures of all records, and what did not hold; how many of those."""
    results: dict[str, Counter[str]] = {}
    broken = []
    for line in plan.last().values():
        name = f"{line['kind']}: {line['key'].split(' | ')[0]}"
        if line["kind"] == "kills":
            name += f", {line['key'].split(' | ')[1]}"
        results.setdefault(name, Counter()).update([line["result"]])
        if line["result"] == "not survived":
            broken.append(f"NOT SURVIVED {line['kind']}: {line['key']}: {line['what'][:3]}")
    total: Counter[str] = Counter()
    for name, counted in sorted(results.items()):
        print(f"{name}: " + ", ".join(f"{n} {result}" for result, n in sorted(counted.items())))
        done = sum(n for result, n in counted.items() if result != "passed over")
        total["kill" if name.endswith(", kill") else name.split(":")[0]] += done
    print("\n".join(sorted(broken)))
    print(
        f"{total['sites']} faults at call sites, {total['kills']} failures and {total['kill']} kills at file "
        f"operations, {total['mutations']} mutated files; {len(broken)} not survived"
    )
    return len(broken)
