"""Solves alone: all layers from made-up statistics, and one layer at several ranks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lorainit
from benchmarks.common.clock import Clock, cleared
from benchmarks.common.decoder import Case
from benchmarks.speed.starts import METHODS, collected, started
from lorainit.types import LayerStatistics


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
