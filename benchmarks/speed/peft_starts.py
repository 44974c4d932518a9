"""PEFT's own data-driven starts, as its documentation calls them, on the same model and data.

Each takes a freshly built model, since CorDA and LoRA-GA change its weights. Where fewer layers are
measured than the shape has, seconds are multiplied by the ratio, and memory is what was measured plus
the missing layers' weights and what the method keeps of every layer.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from benchmarks.common.clock import Clock, peak_gib
from benchmarks.common.decoder import SHAPES, Case, batches_of, config, floor


def run_lora_ga(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    batches = batches_of(case)
    settings = config(case, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    with clock.stretch("total"):
        with clock.stretch("pass"):
            preprocess_loraga(model, settings, lambda: floor(model, batches, clock.device))
        peft.get_peft_model(model, settings)
    return scaled(case, clock, 0)


def run_corda(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """Its hooks only know one sequence a batch."""
    if importlib.util.find_spec("attr") is None:
        # PEFT takes one decorator from attrs, which it does not require.
        sys.modules["attr"] = types.ModuleType("attr")
        sys.modules["attr"].dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    from peft.tuners.lora.corda import preprocess_corda

    batches = batches_of(case)

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"].to(clock.device))

    settings = config(case, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
    with clock.stretch("total"):
        preprocess_corda(model, settings, run_model=run)
        peft.get_peft_model(model, settings)
    shape = case.sizes()
    # Every module keeps its own covariance until the end.
    kept = 4 * (6 * shape.hidden**2 + shape.inner**2)
    return scaled(case, clock, kept)


class Counted(list[Any]):
    """Batches that know how often one was taken: EVA goes round and round until it converges."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.taken += 1
            yield batch


def run_eva(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    batches = Counted([{"input_ids": batch["input_ids"]} for batch in batches_of(case)])
    settings = config(case, init_lora_weights="eva", eva_config=EvaConfig())
    with clock.stretch("total"):
        wrapped = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
        try:
            initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
        except Exception as error:
            raise RuntimeError(f"after {batches.taken} batches: {error}") from error
    return {**scaled(case, clock, 0), "batches": batches.taken}


def scaled(case: Case, clock: Clock, kept: int) -> dict[str, Any]:
    """What all of the shape's layers would take."""
    shape, whole = case.sizes(), SHAPES[case.shape]
    missing = whole.layers - shape.layers
    peak = peak_gib(clock.device)
    weights = 4 * shape.hidden**2 + 3 * shape.hidden * shape.inner
    found: dict[str, Any] = {
        "whole_seconds": clock.seconds["total"] * whole.layers / shape.layers,
        "measured_layers": shape.layers,
    }
    if peak is not None:
        found["whole_peak_gib"] = peak + missing * (2 * weights + kept) / 2**30
    return found
