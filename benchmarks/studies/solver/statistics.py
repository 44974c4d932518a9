"""Stacks of layer statistics: a random model's own, and made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lorainit
from benchmarks.common.clock import cleared
from benchmarks.common.decoder import Case, batches_of, build, config
from benchmarks.speed.solves import synthetic
from lorainit.methods import EVA, LoraDA, Natural
from lorainit.types import LayerStatistics

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def stacks(
    found: lorainit.Statistics, shape: Any, needs: frozenset[str]
) -> dict[str, LayerStatistics]:
    made = {}
    for name, members in GROUPS.items():
        layers = [
            found[f"model.layers.{i}.{m}"].only(needs).to(dtype=None)
            for i in range(shape.layers)
            for m in members
        ]
        made[name] = LayerStatistics.stack(layers, sharing=len(members))
    return made


def from_model(
    shape: Any, device: torch.device, tiny: bool
) -> Callable[[frozenset[str]], dict[str, LayerStatistics]]:
    """Stacks of a random model's own statistics."""
    sizes = (8, 64) if tiny else (256, 512)
    case = Case("study", "start", "study", sequences=sizes[0], tokens=sizes[1])
    with torch.enable_grad():
        found = lorainit.collect_statistics(
            build(shape, device),
            config(case),
            data=batches_of(case),
            needs=LoraDA().needs | Natural().needs | EVA().needs,
            progress=False,
        )
    cleared()
    return lambda needs: stacks(found, shape, needs)


def made_up(shape: Any, device: torch.device, needs: frozenset[str]) -> dict[str, LayerStatistics]:
    sizes = {
        "o": (shape.hidden, shape.hidden),
        "gate up": (shape.inner, shape.hidden),
        "down": (shape.hidden, shape.inner),
    }
    return {
        name: LayerStatistics.stack([synthetic(*size, device, needs).only(needs)] * 2)
        for name, size in sizes.items()
    }


def count(stack: LayerStatistics, name: str, layers: int) -> float:
    """How often a stack stands in the whole model."""
    in_model = {"qkv": 3, "o": 1 if layers else 4, "gate up": 2, "down": 1}[name] * 32
    tensor = stack.gradient if stack.gradient_sum is not None else stack.input_second_moment
    return in_model / tensor.shape[:-2].numel()
