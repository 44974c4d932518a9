"""Raise at every call site of the package, and kill at every file operation: the long form.

    python -m tools.faults [--sites N] [--seed S] [--only NAME ...]

The tests (tests/faults) take a few of each. Exit code 1 where anything did not hold.
"""

from __future__ import annotations

import argparse
import errno
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from tests.faults import file_operations
from tests.faults.operations import disturb, operations
from tests.faults.saves import Case, check_after, saves


def call_sites(most: int | None, seed: int, only: list[str]) -> tuple[int, list[str]]:
    injected, broken = 0, []
    with tempfile.TemporaryDirectory() as made:
        for name, operation in operations(Path(made)).items():
            if only and name not in only:
                continue
            begin = time.monotonic()
            with tempfile.TemporaryDirectory() as place:
                tally = disturb(name, operation, Path(place), most=most, seed=seed)
            injected += tally.injected
            broken += tally.broken
            print(
                f"{name}: {tally.sites} sites, {tally.injected} faults injected, {tally.passed_over} "
                f"passed over, {len(tally.broken)} not survived, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    return injected, broken


def file_faults() -> tuple[int, int, list[str]]:
    kills, failures, broken = 0, 0, []
    for name, save in saves().items():
        with tempfile.TemporaryDirectory() as place:
            case = Case.of(save, Path(place))
            for number in case.numbers(None):
                for kind in ("kill", "full disk", "interrupt"):
                    case.afresh()
                    try:
                        if kind == "kill":
                            kills += file_operations.dying(case.work, case.folder, number)
                        else:
                            full = OSError(errno.ENOSPC, "No space left on device")
                            error = full if kind == "full disk" else KeyboardInterrupt()
                            file_operations.failing(case.work, case.folder, number, error)
                            failures += 1
                        check_after(case, died=kind == "kill")
                    except AssertionError as error:
                        broken.append(f"{name}, {kind} at operation {number}: {error}")
        print(f"{name}: {case.operations} file operations", flush=True)
    return kills, failures, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, help="of each operation; all unless said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="operations; 'files' for the kills")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kills = failures = injected = 0
    broken: list[str] = []
    if not options.only or "files" in options.only:
        kills, failures, broken = file_faults()
    if options.only != ["files"]:
        injected, more = call_sites(options.sites, options.seed, options.only)
        broken += more
    for line in broken:
        print("NOT SURVIVED", line)
    print(
        f"{injected} faults at call sites, {failures} at file operations, {kills} kills; "
        f"{len(broken)} not survived"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
