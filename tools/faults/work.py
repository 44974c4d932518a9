"""One share of the faults: those whose key falls to it."""

from __future__ import annotations

import errno
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tools.faults.shares import Plan, write_record

Item = tuple[str, Callable[[], list[str] | None]]
"""A key, and what gives the things that did not hold; None where nothing was disturbed."""


def work_on(plan: Plan, share: int, jobs: int) -> None:
    """Do what is left of a share."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done = {
        name
        for name, line in plan.last().items()
        if line["result"] != "not survived" or line["at"] >= plan.begun
    }
    now = plan.at_work(share)
    # Processes are forked from one that has never run a backward pass.
    for kind in sorted(plan.kinds, key=["kills", "mutations", "sites"].index):
        with tempfile.TemporaryDirectory() as folder:
            for key, do in ITEMS[kind](plan, Path(folder)):
                if zlib.crc32(key.encode()) % jobs != share or (kind, key) in done:
                    continue
                now.write_text(f"{kind}\t{key}")
                begin = time.monotonic()
                broken = do()
                result = (
                    "passed over" if broken is None else "not survived" if broken else "survived"
                )
                seconds = round(time.monotonic() - begin, 3)
                write_record(
                    plan, share, kind=kind, key=key, result=result, what=broken, seconds=seconds
                )
                now.write_text("")
    now.write_text("")


def _chosen(plan: Plan, names: object) -> list[str]:
    return [name for name in list(names) if not plan.only or name in plan.only]  # type: ignore[call-overload]


def _sites(plan: Plan, folder: Path) -> Iterator[Item]:
    from tests.faults.injection import Disturbed
    from tests.faults.operations import operations

    (folder / "made").mkdir()
    every = operations(folder / "made")
    for number, name in enumerate(_chosen(plan, every)):
        place = folder / str(number)
        place.mkdir()
        disturbed = Disturbed(name, every[name], place)
        for fault in disturbed.faults(plan.seed):
            yield fault.key, lambda d=disturbed, f=fault: d.inject(f)


def _kills(plan: Plan, folder: Path) -> Iterator[Item]:
    from tests.faults.saves import Case, saves

    (folder / "made").mkdir()
    every = saves(folder / "made")
    for number, name in enumerate(_chosen(plan, every)):
        case = Case.of(every[name], folder / str(number))
        for operation in case.numbers(None):
            for kind in ("kill", "full disk", "interrupt"):
                key = f"{name} | {kind} | operation {operation} of {case.operations}"
                yield key, lambda c=case, k=kind, o=operation: _failed(c, k, o)


def _failed(case: object, kind: str, operation: int) -> list[str] | None:
    from tests.faults import file_operations
    from tests.faults.saves import check_after

    case.afresh()  # type: ignore[attr-defined]
    arguments = (case.work, case.folder, operation)  # type: ignore[attr-defined]
    try:
        if kind == "kill":
            if not file_operations.dying(*arguments):
                return None
        else:
            full = OSError(errno.ENOSPC, "No space left on device")
            error = full if kind == "full disk" else KeyboardInterrupt()
            file_operations.failing(*arguments, error)
        check_after(case, died=kind == "kill")  # type: ignore[arg-type]
    except AssertionError as error:
        return [str(error)]
    return []


def _mutations(plan: Plan, folder: Path) -> Iterator[Item]:
    from tests.faults.mutations import mutated, subjects

    every = subjects(folder)
    for name in _chosen(plan, every):
        for number in range(plan.count):
            key = f"{name} | {number}"
            yield key, lambda n=name, i=number: mutated(n, every[n], i, plan.seed).broken


ITEMS = {"sites": _sites, "kills": _kills, "mutations": _mutations}
