"""A base model on its device, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks.quality.models.registry import kind_of
from benchmarks.quantized.quantizers import quantize


def load_model(
    folder: Path | None, device: torch.device, name: str = "smollm2-135m-instruct"
) -> Any:
    """A base model of `KINDS` from a folder, else from the cache of the benchmarks.

    ``NAME+GRID``: the layers that adapters go to are rounded to a grid of ``benchmarks.quantized``.
    """
    model = round_base(kind_of(name).load(folder, device))
    _, _, grid = name.partition("+")
    if grid:
        quantize(model, grid, LoraConfig(**kind_of(name).adapter()))
        round_base(model)
    return model


def full_precision(folder: Path | None, device: torch.device, name: str) -> Any:
    """What a quantized model was before, or None for any other."""
    before, _, grid = name.partition("+")
    return load_model(folder, device, before) if grid else None


@torch.no_grad()
def round_base(model: nn.Module) -> nn.Module:
    """Weights rounded to bfloat16 and kept in float32: what training in either precision reads."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return model


def choose_device(name: str | None = None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    return device
