"""Whole starts of a model in four bits, its full-precision weights read from disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorainit
from benchmarks.common.clock import Clock, cleared, host_peak_gib, peak_gib, reset_peak
from benchmarks.common.decoder import Case, batches_of, config, floor, quantize
from benchmarks.common.package_internals import PARTS_OF_A_START, READING_A_REFERENCE
from benchmarks.speed.starts import METHODS, lines, warm


def run_quantized_start(case: Case, model: Any, clock: Clock) -> dict[str, Any]:
    """A start with ``reference_weights``, beside a training step of plain LoRA on the same base.

    The labels are what the full-precision model predicts, so that there is something to give back.
    Seconds: ``total``, of it ``read`` from the checkpoint, whose files were taken out of the page cache.
    """
    batches = predicted(model, batches_of(case), clock.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        forget_files(folder)
        quantize(model, bits=4, device=clock.device)
        warm(case, model)
        host = host_peak_gib()
        reset_peak(clock.device)
        with (
            lines() as said,
            clock.watching(*PARTS_OF_A_START, *READING_A_REFERENCE) as parts,
            clock.stretch("total"),
        ):
            wrapped = lorainit.get_peft_model(
                model,
                config(case),
                method=METHODS[case.method](),
                data=batches,
                reference_weights=folder,
                progress=False,
                **case.options,
            )
        known = {
            "plan": said,
            "passes": len(parts["pass"]),
            "peak_gib": peak_gib(clock.device),
            "host_gib": host_peak_gib(),
            "host_before_gib": host,
        }
        cleared()
        reset_peak(clock.device)
        wrapped.train()
        floor(wrapped, batches[:1], clock.device)
        wrapped.zero_grad(set_to_none=True)
        known["training_step_peak_gib"] = peak_gib(clock.device)
        wrapped.unload()
    return known


@torch.no_grad()
def predicted(
    model: nn.Module, batches: list[dict[str, Tensor]], device: torch.device
) -> list[dict[str, Tensor]]:
    """The batches, each label what the model finds likeliest after the tokens before it."""
    found = []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        likeliest = model(**inputs).logits.argmax(-1).cpu()
        labels = batch["labels"].clone()
        labels[:, 1:] = likeliest[:, :-1]
        found.append({**batch, "labels": labels})
    return found


def forget_files(folder: Path) -> None:
    """Take files out of the page cache, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
