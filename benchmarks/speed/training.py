"""A LoRA training step, to say which share of a fine-tune a start takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.common.clock import Clock, host_peak_gib
from benchmarks.common.decoder import Case, batches_of, config, floor


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
    return {
        "step_seconds": seconds,
        "epoch_seconds": seconds * 100_000 / case.batch,
        "host_gib": host_peak_gib(),
    }
