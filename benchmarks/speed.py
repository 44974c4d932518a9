"""How long a start takes, beside its floor: one command, JSON lines as it goes.

    python -m benchmarks.speed                 the machine's own plan: 7B on CUDA, small on a CPU
    python -m benchmarks.speed --parts tiny    a few seconds, to see that it runs

The floor is one forward and backward with the gradients of the same weights, over the same batches at
the same batch size. Weights are random (the arithmetic is that of trained ones); every ratio is of one
run on one device. Parts stand alone: each has a limit, and one that fails says so and the next begins.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit
from lorainit.methods import FILet, LoraDA, Natural

RESULTS = Path(__file__).parent / "results"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "tiny": Shape(64, 176, 2, 4, 2, 257),
}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    kind: str
    shape: str
    sequences: int = 256
    tokens: int = 512
    batch: int = 8
    method: str = "lora_da"
    limit: int = 60
    options: tuple[tuple[str, Any], ...] = ()


METHODS = {"lora_da": LoraDA, "filet": FILet, "natural": Natural}


def plan_of(device: torch.device) -> list[Case]:
    """What is measured on this device."""
    if device.type == "cpu":
        small = Case("", "", "smollm2-135m", 64, 128, limit=900)
        return [
            replace(small, name="floor", kind="floor"),
            replace(small, name="pass, LoRA-DA", kind="pass"),
            replace(small, name="pass, full Sy", kind="pass", method="natural"),
        ]
    big = Case("", "", "llama-2-7b")
    return [
        Case("operations", "operations", "llama-2-7b", limit=30),
        replace(big, name="floor", kind="floor"),
        replace(big, name="LoRA-DA, batches to adapter", kind="start", limit=90),
        replace(big, name="pass, full Sy", kind="pass", method="natural", limit=60),
        replace(big, name="floor, 64 x 256", kind="floor", sequences=64, tokens=256),
        replace(big, name="LoRA-DA, 64 x 256", kind="start", sequences=64, tokens=256),
    ]


# --- parts --------------------------------------------------------------------------------------


class OverTimeError(Exception):
    """A part ran past its limit."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OverTimeError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Seconds of named stretches, the device drained at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stretch(self, name: str) -> Iterator[None]:
        self.wait()
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def build(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights, made where it will lie."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        use_cache=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    return model.eval()


def batches_of(case: Case, vocabulary: int) -> list[dict[str, Tensor]]:
    """Random tokens with every token a label; no padding, as in the floor."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (case.sequences, case.tokens), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(case.batch)
    ]


def floor(model: nn.Module, batches: list[dict[str, Tensor]], device: torch.device) -> None:
    for batch in batches:
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        model(**moved).loss.backward()


def run_floor(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    batches = batches_of(case, SHAPES[case.shape].vocabulary)
    model.requires_grad_(True)
    try:
        floor(model, batches[:1], clock.device)
        with clock.stretch("floor"):
            floor(model, batches, clock.device)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    return {}


def config() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=PROJECTIONS)


def collected(case: Case, model: nn.Module, clock: Clock, warm: bool = True) -> lorainit.Statistics:
    batches = batches_of(case, SHAPES[case.shape].vocabulary)
    needs = METHODS[case.method]().needs
    options = dict(case.options)
    if warm:
        quick = {**options}
        lorainit.collect_statistics(
            model, config(), data=batches[:1], needs={"gradient"}, progress=False, **quick
        )
        cleared()
    with clock.stretch("pass"):
        return lorainit.collect_statistics(
            model, config(), data=batches, needs=needs, progress=False, **options
        )


def run_pass(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    found = collected(case, model, clock)
    return {"statistics_gib": found.nbytes / 2**30}


def run_start(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """From batches to an installed adapter, which is taken out again."""
    from lorainit.adapters import install as installing
    from lorainit.adapters.targets import match_targets
    from lorainit.solving import solve_layers

    found = collected(case, model, clock)
    methods = [case.method] if case.method != "lora_da" else ["lora_da"]
    known: dict[str, Any] = {"statistics_gib": found.nbytes / 2**30}
    for name in methods:
        targets = match_targets(model, config())
        with clock.stretch(f"solve {name}"):
            factors, _ = solve_layers(targets.layers, found, METHODS[name](), progress=False)
    del found
    cleared()
    import peft

    with clock.stretch("install"):
        wrapped = peft.get_peft_model(model, config())
        installing.install(wrapped, "default", factors, {})
    wrapped.unload()
    return known


def synthetic(out: int, inner: int, device: torch.device, needs: frozenset[str]) -> Any:
    """Statistics of one layer with falling spectra and a gradient that knows a few directions."""
    from lorainit.types import LayerStatistics

    def moment(n: int, scale: float) -> Tensor:
        x = torch.randn(2 * n, n, device=device)
        x *= torch.arange(1, n + 1, device=device) ** -0.5 * scale
        mix = torch.randn(n, 64, device=device) / n**0.5
        x += (x @ mix) @ mix.mT
        return x.mT @ x / (2 * n)

    weak = torch.randn(out, inner, device=device) * 1e-5
    few = torch.arange(1, 33, device=device) ** -1.0 * 1e-3
    strong = (torch.randn(out, 32, device=device) * few) @ torch.randn(32, inner, device=device)
    full = moment(out, 1e-3) if "output_second_moment" in needs else None
    diagonal = None if full is not None else torch.rand(out, device=device) * 1e-6 + 1e-8
    return LayerStatistics.from_means(
        gradient=weak + strong / (out * inner) ** 0.25,
        input_second_moment=moment(inner, 1.0),
        output_second_moment=full,
        output_second_moment_diagonal=diagonal,
        population=1e5,
    )


def run_solve(case: Case, model: nn.Module | None, clock: Clock) -> dict[str, Any]:
    """All layers' solves, from one stack of each shape times their count, statistics made up."""
    from lorainit.types import LayerStatistics

    shape, device, method = SHAPES[case.shape], clock.device, METHODS[case.method]()
    width = shape.hidden * shape.kv_heads // shape.heads
    groups = {
        (shape.hidden, shape.hidden): 2,
        (width, shape.hidden): 2,
        (shape.inner, shape.hidden): 2,
        (shape.hidden, shape.inner): 1,
    }
    if width == shape.hidden:
        groups = {(width, width): 4, **{k: v for k, v in groups.items() if k[0] != k[1]}}
    options = dict(case.options)
    total, detail = 0.0, {}
    for (out, inner), count in groups.items():
        stack = options.get("stack", 4) if max(out, inner) < 8192 else options.get("large", 2)
        layer = synthetic(out, inner, device, method.needs)
        layers = LayerStatistics.stack([layer.only(method.needs)] * stack)
        weight = (torch.randn(stack, out, inner, device=device) * 0.02).bfloat16()
        method.solve(weight[:1], LayerStatistics.stack([layer.only(method.needs)]), 8, 4.0)
        name = f"{out}x{inner}"
        with clock.stretch(name):
            method.solve(weight, layers, 8, 4.0)
        seconds = clock.seconds.pop(name)
        detail[name] = seconds / stack
        total += seconds / stack * count * shape.layers
        del layer, layers, weight
        cleared()
    clock.seconds["solve"] = total
    return {"seconds_a_layer": detail, "method": case.method}


def run_operations(case: Case, model: nn.Module | None, clock: Clock) -> dict[str, Any]:
    """Single operations, milliseconds."""
    device, found = clock.device, {}
    shape = SHAPES[case.shape]

    def timed(name: str, work: Callable[[], Any], repeats: int = 3) -> None:
        try:
            work()
            clock.wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            clock.wait()
            found[name] = round((time.perf_counter() - begin) / repeats * 1e3, 4)
        except Exception as error:  # an operation that this build lacks is a result
            found[name] = f"{type(error).__name__}: {error}"[:200]

    from lorainit import linalg
    from lorainit.statistics import accumulators

    for n in (shape.hidden, shape.inner):
        x = torch.randn(4096, n, device=device).bfloat16()
        total = torch.zeros(n, n, device=device)
        timed(f"gram {n} bf16 out", lambda x=x: x.mT @ x)
        timed(f"gram {n} fp32 out", lambda x=x, t=total: accumulators.add_product(t, x, x))
        timed(f"gram {n} folded", lambda x=x, t=total: accumulators.add_gram(t, x))
        timed(f"squares {n}", lambda x=x: accumulators.add_squares(None, x))
        wide = x.float()
        second = (wide.mT @ wide) / 4096
        second.diagonal().add_(1e-2)
        for dtype in (torch.float32, torch.float64):
            s, tag = second.to(dtype), str(dtype)[-2:]
            timed(f"cholesky {n} {tag}", lambda s=s: torch.linalg.cholesky_ex(s)[0], 2)
            lower = torch.linalg.cholesky_ex(s)[0]
            thin = torch.randn(n, 16, device=device, dtype=dtype)
            right = torch.randn(n, shape.hidden, device=device, dtype=dtype)
            timed(f"product {n} {tag}", lambda s=s, r=right: s @ r, 2)
            timed(f"thin product {n} {tag}", lambda s=s, r=thin: s @ r)
            timed(
                f"trsm {n} {tag}",
                lambda a=lower, r=right: torch.linalg.solve_triangular(a, r, upper=False),
                2,
            )
            timed(
                f"thin trsm {n} {tag}",
                lambda a=lower, r=thin: torch.linalg.solve_triangular(a, r, upper=False),
            )
            timed(f"inverse {n} {tag}", lambda a=lower: linalg.triangular_inverse(a), 2)
            if n == shape.hidden:
                timed(f"orthonormal {n} {tag}", lambda r=thin: linalg.orthonormal(r))
                timed(f"qr {n} {tag}", lambda r=thin: torch.linalg.qr(r))
        cleared()
    for n in (48, 96, 192):
        small = torch.randn(8, n, n, device=device, dtype=torch.float64)
        small = small + small.mT
        timed(f"eigh 8 x {n}", lambda s=small: torch.linalg.eigh(s))
    return {"milliseconds": found}


def run_profile(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """Where the time of three batches of the pass goes."""
    from torch.profiler import ProfilerActivity, profile

    few = replace(case, sequences=3 * case.batch)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        collected(few, model, clock)
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:14]
    return {"kernels_ms": {e.key[:90]: [e.self_device_time_total / 1e3, e.count] for e in rows}}


KINDS: dict[str, Callable[[Case, Any, Clock], dict[str, Any]]] = {
    "floor": run_floor,
    "pass": run_pass,
    "start": run_start,
    "solve": run_solve,
    "operations": run_operations,
    "profile": run_profile,
}


# --- the command --------------------------------------------------------------------------------


def cleared() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def provenance(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lorainit": lorainit.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(cases: list[Case], device: torch.device, out: Path | None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"name": "provenance", **provenance(device)}]
    say(records[0], out)
    model, built = None, None
    for case in cases:
        record: dict[str, Any] = asdict(case)
        clock = Clock(device)
        try:
            with limited(case.limit):
                if KINDS[case.kind] not in (run_solve, run_operations) and built != case.shape:
                    model = None
                    cleared()
                    model, built = build(SHAPES[case.shape], device), case.shape
                cleared()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                record |= KINDS[case.kind](case, model, clock)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
            record["trace"] = traceback.format_exc()[-600:]
            if model is not None:
                built = None
        record["seconds"] = clock.seconds
        if device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        records.append(record)
        say(record, out)
        cleared()
    return records


def say(record: dict[str, Any], out: Path | None) -> None:
    line = json.dumps({k: v for k, v in record.items() if v not in ((), {})})
    print(line, flush=True)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")


def with_ratios(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pass over the floor of its own batches, where both were measured."""
    floors = {
        (r["shape"], r["sequences"], r["tokens"], r["batch"]): r["seconds"]["floor"]
        for r in records
        if "floor" in r.get("seconds", {})
    }
    for record in records:
        seconds = record.get("seconds", {})
        if "pass" in seconds:
            key = (record["shape"], record["sequences"], record["tokens"], record["batch"])
            if key in floors:
                record["pass_over_floor"] = round(seconds["pass"] / floors[key], 3)
    return records


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default="all", help="all, tiny, or a JSON list of cases")
    parser.add_argument("--out", type=Path, help="JSON lines, written as it goes")
    parser.add_argument("--results", type=Path, help="the whole, as one JSON file")
    options = parser.parse_args(arguments)
    logging.getLogger("lorainit").setLevel(logging.INFO)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    device = torch.device(options.device)
    if options.parts == "tiny":
        tiny = Case("", "", "tiny", 8, 16, 4)
        cases = [replace(tiny, name=kind, kind=kind) for kind in KINDS]
        cases += [replace(tiny, name="solve", kind="solve", method=m) for m in ("filet", "natural")]
    elif options.parts == "all":
        cases = plan_of(device)
    else:
        cases = [Case(**entry) for entry in json.loads(options.parts)]
    records = with_ratios(measure(cases, device, options.out))
    if options.results:
        options.results.write_text(json.dumps(records, indent=1) + "\n")
    for record in records:
        if "pass_over_floor" in record:
            print(f"{record['name']}: {record['pass_over_floor']} x the floor")
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
