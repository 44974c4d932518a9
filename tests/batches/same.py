"""The start from batches of several is that from single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import lorainit
from lorainit.types import STATISTICS
from tests.statistics.models import all_linear

FIELDS = (
    "gradient_sum",
    "input_second_moment_sum",
    "input_sum",
    "output_second_moment_sum",
    "output_second_moment_diagonal_sum",
)


def collected(model: nn.Module, data: Iterable[Any], **settings: Any) -> lorainit.Statistics:
    settings = {"needs": STATISTICS, "progress": False, "config": all_linear()} | settings
    config = settings.pop("config")
    return lorainit.collect_statistics(model, config, data=data, **settings)


def difference(first: lorainit.Statistics, second: lorainit.Statistics) -> float:
    """The largest difference of any sum, relative to the largest entry of that sum."""
    assert first.names == second.names
    found = 0.0
    for name in first.names:
        for field in FIELDS:
            a, b = getattr(first[name], field), getattr(second[name], field)
            assert (a is None) == (b is None)
            found = found if a is None else max(found, relative(a, b))
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def started(
    build: Callable[[], nn.Module], data: Sequence[Any], method: Any = None, **settings: Any
) -> dict[str, Tensor]:
    """``B A`` of every layer, in float64 throughout: a measured length follows every bit."""
    settings = {"progress": False, "config": all_linear(), "precision": "exact"} | settings
    config = settings.pop("config")
    method = method or lorainit.Natural(steps=1, rho=1, spare=None)
    wrapped = lorainit.get_peft_model(
        build().double(), config, method=method, data=data, **settings
    )
    found = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = (b @ a).detach()
    return found


def start_difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(relative(first[name], second[name]) for name in first)
