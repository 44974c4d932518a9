"""One case, and the links by themselves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorainit
from benchmarks.common.clock import cleared
from benchmarks.common.decoder import config
from benchmarks.common.package_internals import PARTS_OVER_PROCESSES
from benchmarks.common.provenance import provenance as common_provenance
from benchmarks.scaling.cases import Case
from benchmarks.scaling.processes import Machine, collected, data_of, model_of
from benchmarks.scaling.sketches import (
    compared,
    digest,
    distances,
    factor_sketches,
    factors_of,
    sketches,
)
from lorainit.methods import LoraDA


def run_case(case: Case, machine: Machine, folder: Path) -> dict[str, Any]:
    peaks: dict[str, list[float]] = {}
    record: dict[str, Any] = {"peak_gib": peaks}
    model = model_of(case, machine)
    data = data_of(case, machine)
    cleared()
    collected(case, model, data[:1])
    taken = []
    for number in (1, 2):
        # Each begins with an empty allocator, like a user's; what is warm are the libraries.
        cleared()
        with machine.peak("pass", peaks), machine.stretch(f"pass {number}"):
            found = collected(case, model, data)
        record["statistics_gib"] = machine.gathered(found.nbytes / 2**30)
        taken.append(sketches(found, machine))
        del found
    # The same again on the same processes: the attention's backward adds in any order.
    record["repeat_distance"] = distances(*taken)
    record["statistics_distance"] = compared(case, "statistics", taken[0], machine, folder)
    cleared()
    if case.start:
        with sdpa_kernel(SDPBackend.MATH):
            taken = [sketches(collected(case, model, data), machine)]
        record["ordered_distance"] = compared(case, "ordered", taken[0], machine, folder)
        cleared()
        with (
            machine.peak("start", peaks),
            machine.watching(*PARTS_OVER_PROCESSES),
            machine.stretch("start"),
        ):
            wrapped = lorainit.get_peft_model(
                model, config(case.whole()), method=LoraDA(), data=data, progress=False
            )
        digests = machine.gathered(digest(factors_of(wrapped)))
        record["factors_identical"] = len(set(digests)) == 1
        record["product_distance"] = compared(
            case, "factors", factor_sketches(wrapped), machine, folder
        )
        del wrapped
    return record


def run_links(machine: Machine) -> dict[str, Any]:
    """Collectives by themselves: GB/s of the whole tensor's bytes, and milliseconds of a small one."""
    found: dict[str, Any] = {}
    # PyTorch 2.13 gave them other names.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for megabytes in (4, 128, 1024) if machine.device.type == "cuda" else (1,):
        whole = torch.ones(megabytes * 2**18, device=machine.device)
        part = torch.empty(whole.numel() // machine.world, device=machine.device)
        whole = whole[: part.numel() * machine.world]
        works: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda t=whole: dist.all_reduce(t),
            "broadcast": lambda t=whole: dist.broadcast(t, 0),
            "reduce": lambda t=whole: dist.reduce(t, 0),
            "reduce_scatter": lambda t=whole, p=part: scatter(p, t),
            "all_gather": lambda t=whole, p=part: gather(t, p),
        }
        for name, work in works.items():
            work()
            machine.wait()
            begin = time.perf_counter()
            for _ in range(5):
                work()
            machine.drain()
            seconds = (time.perf_counter() - begin) / 5
            found[f"{name} {megabytes} MiB, GB/s"] = whole.numel() * 4 / seconds / 1e9
    small = torch.ones(1, device=machine.device)
    for name, work in (
        ("small all_reduce, ms", lambda: (dist.all_reduce(small), machine.drain())),
        ("gather of objects, ms", lambda: machine.gathered(1)),
    ):
        machine.wait()
        begin = time.perf_counter()
        for _ in range(20):
            work()
        found[name] = (time.perf_counter() - begin) / 20 * 1e3
    return found


def provenance(machine: Machine) -> dict[str, Any]:
    found = common_provenance(machine.device)
    if machine.device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["nccl_settings"] = {k: v for k, v in os.environ.items() if k.startswith("NCCL_")}
        try:
            command = ["nvidia-smi", "topo", "-m"]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
            found["links"] = shown[:1500]
        except (OSError, subprocess.TimeoutExpired) as error:
            found["links"] = str(error)
    return found | {"processes": machine.world, "backend": dist.get_backend()}
