"""One start over several processes, beside one: torchrun, JSON lines as it goes.

    torchrun --nproc-per-node 1 -m benchmarks.scaling --out FOLDER     first: the reference
    torchrun --nproc-per-node 2 -m benchmarks.scaling --out FOLDER
    torchrun --nproc-per-node 2 -m benchmarks.scaling --out FOLDER --tiny      seconds, on gloo
    python -m benchmarks.scaling --collect FOLDER --table      keep the lines, print the tables

All launches see the same sequences, in the same batches, shared out. The one-process launch leaves
sketches of its statistics in the folder, and every later one is compared with them: of a statistic
``T`` the sketch is ``P^T T Q`` with fixed Gaussian ``P`` and ``Q`` of 16 columns, so that the norm of a
difference of sketches estimates that of the difference. Weights are random, as in `benchmarks.speed`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import lorainit
from benchmarks import scaling_table
from benchmarks.timing import cases as timed_cases
from benchmarks.timing.cases import SHAPES
from benchmarks.timing.clock import Clock, cleared, limited
from benchmarks.timing.clock import provenance as common_provenance
from benchmarks.timing.model import batches_of, build, config
from lorainit.adapters.wrappers import adapter_tensors
from lorainit.methods import LoraDA

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SKETCH = 16
REFERENCE = "reference.pt"


@dataclass(frozen=True)
class Case:
    """One model, placed in one way, and one amount of data over all processes."""

    kind: str
    sequences: int
    tokens: int = 512
    batch: int = 8
    shape: str = "llama-2-7b"
    start: bool = False
    limit: int = 90

    def whole(self) -> timed_cases.Case:
        """The same amount of data for one process."""
        return timed_cases.Case(
            "",
            "",
            self.shape,
            sequences=self.sequences,
            tokens=self.tokens,
            batch=self.batch,
        )

    @property
    def key(self) -> str:
        """What a reference must have in common with it."""
        return f"{self.shape} {self.sequences} x {self.tokens} by {self.batch}"


def plan_of(
    world: int, kinds: Sequence[str], *, tiny: bool, batch: int | None = None
) -> list[Case]:
    """What is measured on so many processes; the most wanted first."""
    kinds = ["plain"] if world == 1 else kinds
    cases = [Case(kind, 64, start=True) for kind in kinds]
    cases += [Case(kind, 256) for kind in kinds]
    if batch is not None:
        cases = [Case(kind, 256, batch=batch) for kind in kinds]
    if tiny:
        cases = [replace(c, tokens=16, batch=4, shape="tiny") for c in cases]
    return cases


# --- parts --------------------------------------------------------------------------------------


class Machine(Clock):
    """This process's device, its place among the others, and a clock that all of them stop."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wait(self) -> None:
        """Wait until the device has nothing left to do, on every process."""
        self.drain()
        dist.barrier()
        self.drain()

    def drain(self) -> None:
        """The same on this process alone."""
        super().wait()

    @contextmanager
    def peak(self, name: str, peaks: dict[str, list[float]]) -> Iterator[None]:
        """Largest memory of each card, GiB."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        peaks[name] = self.gathered(torch.cuda.max_memory_allocated(self.device) / 2**30)

    def gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def model_of(case: Case, machine: Machine) -> nn.Module:
    """The same random weights on every card, then sharded where the case says so."""
    model = build(SHAPES[case.shape], machine.device)
    if case.kind == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def data_of(case: Case, machine: Machine) -> list[dict[str, Tensor]]:
    """This process's batches: every so-manieth of those that one process would see."""
    return batches_of(case.whole())[machine.rank :: machine.world]


def collected(case: Case, model: nn.Module, data: list[dict[str, Tensor]]) -> lorainit.Statistics:
    return lorainit.collect_statistics(
        model, config(case.whole()), data=data, needs=LoraDA.needs, gather=False, progress=False
    )


@contextmanager
def stretches(machine: Machine) -> Iterator[None]:
    """Inside, what a start consists of is timed apart; all processes wait for one another there."""
    from lorainit import pipeline, start
    from lorainit.adapters import install as installing
    from lorainit.statistics import finishing, reduction

    # The package's `collect` is the function.
    collecting = importlib.import_module("lorainit.statistics.collect")

    with machine.watching(
        ("reduce_layers", finishing, "reduce_layers"),
        ("to_owners", reduction, "to_owners"),
        ("check_layers", finishing, "_check_layers"),
        ("fingerprints", start.Measured, "_fingerprints"),
        ("run", collecting, "run_batches"),
        ("finish", collecting, "finish"),
        ("solve_layers", start, "solve_layers"),
        ("install", installing, "install"),
        ("wrap", pipeline, "create_adapter"),
    ):
        yield


# --- comparing ----------------------------------------------------------------------------------


def _random(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, SKETCH, generator=generator, dtype=torch.float64).to(device)


def sketch(tensor: Tensor) -> Tensor:
    """``(16, 16)`` of a matrix, ``(16,)`` of a vector, float64 on the CPU."""
    left = _random(tensor.shape[0], tensor.device)
    found = left.mT @ tensor.double()
    if tensor.dim() == 2:
        found = found @ _random(tensor.shape[1], tensor.device)
    return found.cpu()


def sketches(statistics: lorainit.Statistics, machine: Machine) -> dict[str, Tensor]:
    """Of every statistic of every layer, from whichever process holds it."""
    own = {
        f"{name} {field}": sketch(tensor)
        for name, layer in statistics.items()
        for field in layer.TENSORS
        if (tensor := getattr(layer, field)) is not None
    }
    found: dict[str, Tensor] = {}
    for theirs in machine.gathered(own):
        found |= theirs
    return found


@torch.no_grad()
def factor_sketches(model: nn.Module) -> dict[str, Tensor]:
    """Of ``B A`` of every layer."""
    tensors = dict(model.named_parameters())
    found = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            left = _random(b.shape[0], b.device).mT @ b.double()
            found[f"{name} product"] = (left @ (a.double() @ _random(a.shape[1], a.device))).cpu()
    return found


def distances(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Relative distances by kind of statistic: the median and the largest over the layers."""
    if set(found) != set(reference):
        return {"error": f"{len(set(found) ^ set(reference))} statistics are not in both"}
    kinds: dict[str, list[float]] = {}
    for key, value in found.items():
        other = reference[key]
        scale = float(other.norm()) or 1.0
        kinds.setdefault(key.split(" ")[1], []).append(float((value - other).norm()) / scale)
    return {
        kind: {"median": sorted(values)[len(values) // 2], "largest": max(values)}
        for kind, values in kinds.items()
    }


def digest(tensors: list[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def compared(
    case: Case, what: str, found: dict[str, Tensor], machine: Machine, folder: Path
) -> dict[str, Any]:
    """Keep the one process's sketches, or say how far these are from them."""
    if machine.rank:
        return {}
    path = folder / f"{what} {case.key} {REFERENCE}".replace(" ", "-")
    if machine.world == 1:
        save_file({key: value.cpu().contiguous().clone() for key, value in found.items()}, path)
        return {}
    if not path.exists():
        return {"error": "no reference: launch with one process first"}
    return distances({key: value.cpu() for key, value in found.items()}, load_file(path))


# --- cases --------------------------------------------------------------------------------------


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
        with machine.peak("start", peaks), stretches(machine), machine.stretch("start"):
            wrapped = lorainit.get_peft_model(
                model, config(case.whole()), method=LoraDA(), data=data, progress=False
            )
        digests = machine.gathered(digest(adapter_tensors(wrapped, "default")))
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


# --- the command --------------------------------------------------------------------------------


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for JSON lines and sketches")
    parser.add_argument(
        "--collect", type=Path, help="keep a folder's lines as results/scaling.json"
    )
    parser.add_argument("--table", action="store_true", help="print the tables of docs/scaling.md")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--kinds", nargs="+", default=["plain", "fsdp"], choices=["plain", "fsdp"])
    parser.add_argument("--batch", type=int, help="sequences a batch, of the largest case alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.collect:
        RESULTS.write_text(json.dumps(scaling_table.read_folder(options.collect), indent=1) + "\n")
    if options.table:
        print(scaling_table.tables(json.loads(RESULTS.read_text())))
    if options.collect or options.table:
        return 0
    if options.out is None:
        parser.error("--out is needed to measure")
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=100),
        device_id=device if cuda else None,
    )
    machine = Machine(device)
    path = folder / f"scaling-{machine.world}.jsonl"

    def say(record: dict[str, Any]) -> None:
        if machine.rank == 0 or "error" in record:
            line = json.dumps({"rank": machine.rank, "processes": machine.world, **record})
            print(line, flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    say({"name": "provenance", **provenance(machine)})
    works: list[tuple[dict[str, Any], int, Callable[[], dict[str, Any]]]] = [
        (
            {"name": case.kind, **asdict(case)},
            case.limit,
            lambda c=case: run_case(c, machine, folder),
        )
        for case in plan_of(machine.world, options.kinds, tiny=options.tiny, batch=options.batch)
    ]
    works.insert(0, ({"name": "links"}, 60, lambda: run_links(machine)))
    for record, limit, work in works:
        machine.seconds = {}
        try:
            with limited(limit):
                record |= work()
            cleared()
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
            record["trace"] = traceback.format_exc()[-1500:]
            say(record | {"seconds": machine.seconds})
            # The others may stand in a collective that this process has left.
            sys.stdout.flush()
            os._exit(1)
        say(record | {"seconds": machine.seconds})
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
