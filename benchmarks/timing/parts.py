"""How each kind of case is measured. Every function gives what it found beside the clock's seconds."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lorainit
from benchmarks.timing.cases import Case
from benchmarks.timing.clock import Clock, cleared, peak_gib, reset_peak
from benchmarks.timing.model import batches_of, config, floor
from lorainit.methods import EVA, CorDA, FILet, LoraDA, LoraGA, Natural
from lorainit.types import LayerStatistics

METHODS: dict[str, Callable[[], Any]] = {
    "lora_da": LoraDA,
    "filet": FILet,
    "natural": Natural,
    "eva": EVA,
    "corda": CorDA,
    "lora_ga": LoraGA,
}


# --- the floor, a pass, a start -----------------------------------------------------------------


def run_floor(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    batches = batches_of(case)
    model.requires_grad_(True)
    try:
        floor(model, batches[:1], clock.device)
        reset_peak(clock.device)
        with clock.stretch("floor"):
            floor(model, batches, clock.device)
        return {"peak_gib": peak_gib(clock.device)}
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)


def collected(case: Case, model: nn.Module, clock: Clock) -> lorainit.Statistics:
    with clock.stretch("pass"):
        return lorainit.collect_statistics(
            model,
            config(case),
            data=batches_of(case),
            needs=METHODS[case.method]().needs,
            progress=False,
            **case.options,
        )


def warm(case: Case, model: nn.Module) -> None:
    """One batch, so that libraries are loaded; the memory it took is given back."""
    options = {k: v for k, v in case.options.items() if k == "max_memory"}
    # No backward where the method has none: its memory may not be there.
    forward_alone = METHODS[case.method]().needs <= {"input_second_moment", "input_mean"}
    lorainit.collect_statistics(
        model,
        config(case),
        data=batches_of(replace(case, sequences=min(case.batch, case.sequences))),
        needs={"input_mean"} if forward_alone else {"gradient", "input_mean"},
        progress=False,
        **options,
    )
    cleared()


def run_pass(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    warm(case, model)
    reset_peak(clock.device)
    with lines() as said:
        found = collected(case, model, clock)
    return {"statistics_gib": found.nbytes / 2**30, "plan": said[0]}


def run_start(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """From batches to an installed adapter by one public call, which is taken out again."""
    warm(case, model)
    reset_peak(clock.device)
    with lines() as said, parts_of_a_start(clock) as parts, clock.stretch("total"):
        wrapped = lorainit.get_peft_model(
            model,
            config(case),
            method=METHODS[case.method](),
            data=batches_of(case),
            progress=False,
            **case.options,
        )
    known = {
        "statistics_gib": sum(parts["finish"]) / 2**30,
        "passes": len(parts["pass"]),
        "plan": said[0],
        "peak_gib": peak_gib(clock.device),
    }
    wrapped.unload()
    return known


def run_full(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """One pass with full `Sy`, from which FILet and Natural both start."""
    warm(case, model)
    reset_peak(clock.device)
    with lines() as said:
        found = collected(case, model, clock)
    known = {"statistics_gib": found.nbytes / 2**30, "plan": said[0]}
    known["pass_peak_gib"] = peak_gib(clock.device)
    for name in ("filet", "natural"):
        started(case, model, clock, found, name)
    return known


def started(
    case: Case,
    model: nn.Module,
    clock: Clock,
    found: lorainit.Statistics,
    name: str,
    **options: Any,
) -> dict[str, Tensor]:
    """Solve and install from statistics; seconds under the method's name. Gives the factors."""
    own = Clock(clock.device)
    try:
        with quiet(), parts_of_a_start(own), own.stretch("start"):
            wrapped = lorainit.get_peft_model(
                model,
                config(case),
                method=METHODS[name](),
                statistics=found,
                progress=False,
                **options,
            )
    finally:
        for part, seconds in own.seconds.items():
            clock.seconds[f"{part} {name}"] = seconds
    factors = {
        key: value.detach().clone() for key, value in wrapped.named_parameters() if "lora_" in key
    }
    wrapped.unload()
    return factors


@contextlib.contextmanager
def parts_of_a_start(clock: Clock) -> Iterator[dict[str, list[Any]]]:
    """Watches what `get_peft_model` does."""
    start, pipeline, collect = (
        importlib.import_module(f"lorainit.{name}")
        for name in ("start", "pipeline", "statistics.collect")
    )
    with clock.watching(
        ("plan", start, "prepare"),
        ("plan", collect, "prepare"),
        ("pass", collect, "run_batches"),
        ("finish", collect, "finish"),
        ("solve", start, "solve_layers"),
        ("install", pipeline.installing, "install"),
    ) as results:
        yield results


@contextlib.contextmanager
def lines() -> Iterator[list[str]]:
    """What the package says in its log."""
    said: list[str] = []
    logger = logging.getLogger("lorainit")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that Natural's length was not measured: only its solve is timed."""
    logger = logging.getLogger("lorainit")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- solves ---------------------------------------------------------------------------------------


def synthetic(out: int, inner: int, device: torch.device, needs: frozenset[str]) -> LayerStatistics:
    """Statistics of one layer with falling spectra and a gradient that knows a few directions."""

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
    shape, device, method = case.sizes(), clock.device, METHODS[case.method]()
    narrow = shape.hidden * shape.kv_heads // shape.heads
    groups: dict[tuple[int, int], int] = defaultdict(int)
    groups[(shape.hidden, shape.hidden)] += 2
    groups[(narrow, shape.hidden)] += 2
    groups[(shape.inner, shape.hidden)] += 2
    groups[(shape.hidden, shape.inner)] += 1
    total, detail = 0.0, {}
    for (out, inner), count in groups.items():
        stack = 4 if max(out, inner) < 8192 else 2
        layer = synthetic(out, inner, device, method.needs).only(method.needs)
        layers = LayerStatistics.stack([layer] * stack)
        weight = (torch.randn(stack, out, inner, device=device) * 0.02).bfloat16()
        method.solve(weight[:1], LayerStatistics.stack([layer]), case.rank, 4.0)
        name = f"{out}x{inner}"
        with clock.stretch(name):
            method.solve(weight, layers, case.rank, 4.0)
        seconds = clock.seconds.pop(name)
        detail[name] = seconds / stack
        total += seconds / stack * count * shape.layers
        del layer, layers, weight
        cleared()
    clock.seconds["solve"] = total
    return {"seconds_a_layer": detail}


def run_ranks(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """One layer's statistics, solved at several ranks by three methods."""
    found = collected(replace(case, method="natural", options={}), model, clock)
    failed = {}
    for rank in case.options["ranks"]:
        for name in ("lora_da", "filet", "natural"):
            own = Clock(clock.device)
            try:
                if rank == case.options["ranks"][0]:
                    started(replace(case, rank=rank), model, Clock(clock.device), found, name)
                started(replace(case, rank=rank), model, own, found, name)
                clock.seconds[f"{name} {rank}"] = own.seconds[f"solve {name}"]
            except (lorainit.LorainitError, torch.OutOfMemoryError) as error:
                failed[f"{name} {rank}"] = str(error)[:200]
    return {"failed": failed} if failed else {}


def run_precision(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """How far `fast` is from `exact`: angle of A's row spaces, and of B A, largest over the layers."""
    found = collected(replace(case, method="natural"), model, clock)
    apart: dict[str, dict[str, float]] = {}
    for name in ("lora_da", "filet", "natural"):
        fast = started(case, model, clock, found, name)
        seconds = clock.seconds[f"solve {name}"]
        exact = started(case, model, clock, found, name, precision="exact")
        angle, change = 0.0, 0.0
        for key in fast:
            if "lora_A" not in key:
                continue
            other = key.replace("lora_A", "lora_B")
            (a, b), (c, d) = ((f[key].double(), f[other].double()) for f in (fast, exact))
            angle = max(angle, sine_between(a.mT, c.mT))
            miss = torch.linalg.norm(b @ a - d @ c) / torch.linalg.norm(d @ c)
            change = max(change, float(miss))
        apart[name] = {
            "sine": angle,
            "product": change,
            "fast_seconds": seconds,
            "exact_seconds": clock.seconds[f"solve {name}"],
        }
    return {"apart": apart}


def sine_between(first: Tensor, second: Tensor) -> float:
    """Sine of the largest principal angle of two column spaces, without a difference of ones."""
    u, v = torch.linalg.qr(first)[0], torch.linalg.qr(second)[0]
    return float(torch.linalg.matrix_norm(v - u @ (u.mT @ v), ord=2))


def run_objective(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """LoRA-DA's own objective, beside that of ten LOBPCG iterations from a random start."""
    found = collected(case, model, clock)
    factors = started(case, model, clock, found, "lora_da")
    method, values = LoraDA(), {}
    for key, a in factors.items():
        if "lora_A" not in key:
            continue
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        omega = objective_matrix(found[name], method)
        n = omega.shape[-1]
        torch.manual_seed(0)
        start = torch.randn(n, case.rank, device=omega.device)
        released = torch.lobpcg(omega.float(), X=start, niter=10, largest=False)[1]
        best = torch.linalg.eigvalsh(omega)[: case.rank].sum() if n <= 4096 else None
        values[name] = {
            "ours": subspace_value(omega, a.mT),
            "lobpcg": subspace_value(omega, released),
            "least": None if best is None else float(best),
        }
    return {"objective": values}


def objective_matrix(layer: LayerStatistics, method: LoraDA) -> Tensor:
    """LoRA-DA's `Omega`, dense in float64, straight from the formula."""
    second = layer.input_second_moment.double()
    y = layer.output_second_moment_diagonal.double()
    z = second + method.damping * second.diagonal().mean() * torch.eye(
        len(second), dtype=second.dtype, device=second.device
    )
    y = y + method.damping * y.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(z))
    change = -(inverse @ layer.gradient.double().mT) / y
    sigma = torch.linalg.eigvalsh(change @ change.mT)[-1].sqrt()
    known = layer.population if layer.population is not None else layer.sequences
    variance = method.beta * (1 / y).sum() / (float(known) * sigma**2)
    return variance * inverse - method.bias_weight * (change @ change.mT) / sigma**2


def subspace_value(omega: Tensor, basis: Tensor) -> float:
    """``tr(Q^T Omega Q)`` for an orthonormal basis ``Q`` of the columns."""
    q = torch.linalg.qr(basis.double())[0]
    return float(torch.trace(q.mT @ omega @ q))


# --- the share of a fine-tune ---------------------------------------------------------------------


def run_share(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """A LoRA training step of `batch` sequences, and an epoch of 100,000 of them."""
    warmup, steps = 3, 10
    wrapped = peft.get_peft_model(model, config(case))
    learned = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=clock.device.type == "cuda")
    batches = batches_of(replace(case, sequences=case.batch * (warmup + steps)))
    wrapped.train()

    def step(batch: dict[str, Tensor]) -> None:
        floor(wrapped, [batch], clock.device)
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches[:warmup]:
        step(batch)
    with clock.stretch("steps"):
        for batch in batches[warmup:]:
            step(batch)
    wrapped.unload()
    model.eval()
    seconds = clock.seconds["steps"] / steps
    return {"step_seconds": seconds, "epoch_seconds": seconds * 100_000 / case.batch}


# --- where the time is ----------------------------------------------------------------------------


def run_operations(case: Case, model: nn.Module | None, clock: Clock) -> dict[str, Any]:
    """Single operations, milliseconds."""
    from lorainit.linalg.triangle import lower_inverse

    from lorainit.statistics import accumulators

    device, shape = clock.device, case.sizes()
    found: dict[str, Any] = {}

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
                f"triangular solve {n} {tag}",
                lambda a=lower, r=right: torch.linalg.solve_triangular(a, r, upper=False),
                2,
            )
            timed(
                f"thin triangular solve {n} {tag}",
                lambda a=lower, r=thin: torch.linalg.solve_triangular(a, r, upper=False),
            )
            timed(f"inverse {n} {tag}", lambda a=lower: lower_inverse(a.unsqueeze(0)), 2)
            if n == shape.hidden:
                timed(f"qr {n} {tag}", lambda r=thin: torch.linalg.qr(r))
        cleared()
    for n in (48, 96, 192):
        small = torch.randn(8, n, n, device=device, dtype=torch.float64)
        small = small + small.mT
        timed(f"eigh 8 x {n}", lambda s=small: torch.linalg.eigh(s))
    return {"milliseconds": found}


def run_profile(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """Where a pass and its solves spend their time, by kernel; and what the Grams take."""
    few = replace(case, sequences=3 * case.batch)
    warm(few, model)
    with grams(clock.device) as spent:
        collected(few, model, clock)
    clock.seconds.pop("pass")
    known: dict[str, Any] = {"grams_ms": spent()}
    with profile(activities=activities(clock.device)) as trace:
        found = collected(few, model, clock)
    known["pass_ms"] = table(trace, clock.device)
    with profile(activities=activities(clock.device)) as trace:
        started(few, model, clock, found, few.method)
    known["solve_ms"] = table(trace, clock.device)
    return known


def run_profile_floor(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """The same, of the floor."""
    few = replace(case, sequences=3 * case.batch)
    model.requires_grad_(True)
    try:
        floor(model, batches_of(few)[:1], clock.device)
        with profile(activities=activities(clock.device)) as trace, clock.stretch("floor"):
            floor(model, batches_of(few), clock.device)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
    return {"floor_ms": table(trace, clock.device)}


def activities(device: torch.device) -> list[ProfilerActivity]:
    only = [ProfilerActivity.CPU]
    return [*only, ProfilerActivity.CUDA] if device.type == "cuda" else only


def table(trace: profile, device: torch.device) -> dict[str, Any]:
    """The heaviest kernels, ``[milliseconds, calls]``, and the sum over all."""

    def spent(event: Any) -> float:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        return float(own) / 1e3

    rows = sorted(trace.key_averages(), key=spent, reverse=True)
    top = {event.key[:90]: [round(spent(event), 3), event.count] for event in rows[:14]}
    return {"all": round(sum(map(spent, rows)), 3), **top}


@contextlib.contextmanager
def grams(device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Milliseconds in each kind of sum, by events that nothing waits for."""
    from lorainit.statistics import accumulators

    marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def mark() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = mark()
            result = work(*args)
            marks[name].append((begin, mark()))
            return result

        return timed

    def spent() -> dict[str, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return {n: sum(a.elapsed_time(b) for a, b in pairs) for n, pairs in marks.items()}
        return {n: sum(b - a for a, b in pairs) * 1e3 for n, pairs in marks.items()}

    with contextlib.ExitStack() as stack:
        for where, name in (
            (accumulators.LayerSums, "add_gradient"),
            (accumulators.LayerSums, "add_output"),
            (accumulators.InputSums, "add"),
        ):
            work = watched(name, getattr(where, name))
            stack.enter_context(mock.patch.object(where, name, work))
        yield spent
