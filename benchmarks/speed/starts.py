"""The floor, a pass of statistics, and a start by the public interface."""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

import lorainit
from benchmarks.common.clock import Clock, cleared, host_peak_gib, peak_gib, reset_peak
from benchmarks.common.decoder import Case, batches_of, config, floor
from benchmarks.common.package_internals import PARTS_OF_A_START
from benchmarks.common.subspaces import sine_between
from lorainit.methods import EVA, QERA, Auto, CorDA, FILet, LoraDA, LoraGA, Natural

METHODS: dict[str, Callable[[], Any]] = {
    "lora_da": LoraDA,
    "filet": FILet,
    "natural": Natural,
    "auto": Auto,
    "eva": EVA,
    "corda": CorDA,
    "lora_ga": LoraGA,
    "qera": QERA,
    # What three bits and fewer get, whatever the bits.
    "giving_back": partial(Auto, least_taken=0.0),
}


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
    """One batch, so that libraries are loaded; the memory it took is given back.

    Of one block's layers: the gradients of all of a large model are too many for the host.
    """
    options = {k: v for k, v in case.options.items() if k == "max_memory"}
    # No backward where the method has none: its memory may not be there.
    forward_alone = METHODS[case.method]().needs <= {"input_second_moment", "input_mean"}
    lorainit.collect_statistics(
        model,
        config(case, layers_to_transform=[0]),
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
    if case.offloaded:
        offload(model, clock)
    warm(case, model)
    reset_peak(clock.device)
    with lines() as said, clock.watching(*PARTS_OF_A_START) as parts, clock.stretch("total"):
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
        "passes": 1 if "block by block," in said[0] else len(parts["pass"]),
        "plan": said[0],
        "peak_gib": peak_gib(clock.device),
        "host_gib": host_peak_gib(),
    }
    wrapped.unload()
    return known


def offload(model: nn.Module, clock: Clock) -> None:
    """Weights to the host; the seconds of copying all of them to the device once are kept as `bus`."""
    weights = [weight.detach() for weight in model.to("cpu").parameters()]
    accelerate.cpu_offload(model, execution_device=clock.device)
    cleared()
    reset_peak(clock.device)
    with clock.stretch("bus"):
        for weight in weights:
            weight.to(clock.device)


def run_budget(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """A start within a budget beside the one without: sines of the largest angle of `A`, and `B A`."""
    free = {k: v for k, v in case.options.items() if k != "max_memory"}
    truth = factors_of(replace(case, options=free), model)
    cleared()
    reset_peak(clock.device)
    found = factors_of(case, model)
    peak = peak_gib(clock.device)
    angles, changes = [], []
    for key in truth:
        if "lora_A" not in key:
            continue
        other = key.replace("lora_A", "lora_B")
        (a, b), (c, d) = (
            [f[k].to(clock.device).double() for k in (key, other)] for f in (found, truth)
        )
        angles.append(sine_between(a.mT, c.mT))
        whole = torch.linalg.norm(d @ c)
        changes.append(float(torch.linalg.norm(b @ a - d @ c) / whole.clamp_min(1e-30)))
    return {
        "sine_largest": max(angles),
        "sine_median": statistics.median(angles),
        "product_largest": max(changes),
        "product_median": statistics.median(changes),
        "peak_gib": peak,
    }


def factors_of(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """Of a start by the public interface, on the host."""
    torch.manual_seed(0)
    wrapped = lorainit.get_peft_model(
        model,
        config(case),
        method=METHODS[case.method](),
        data=batches_of(case),
        progress=False,
        **case.options,
    )
    found = {n: p.detach().cpu() for n, p in wrapped.named_parameters() if "lora_" in n}
    wrapped.unload()
    return found


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
        with quiet(), own.watching(*PARTS_OF_A_START), own.stretch("start"):
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
