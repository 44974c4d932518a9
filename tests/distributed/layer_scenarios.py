"""Run by two processes: a Whisper's convolutions, tables and words, each process with its own sequences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import lorainit
from tests.statistics import models

TARGETS = ["conv1", "conv2", "embed_tokens", "q_proj"]
FIELDS = ("gradient_sum", "input_second_moment_sum", "input_counts", "output_second_moment_sum")


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(6):
        labels = torch.randint(3, models.VOCABULARY, (1, 6), generator=generator)
        sound = torch.randn(1, 8, 20, generator=generator, dtype=torch.float64)
        found.append({"input_features": sound, "labels": labels})
    return found


def started(rank: int, size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Statistics and the factors of LoRA-DA, from this process's share of the rows."""
    data = rows()[rank::size]
    config = LoraConfig(r=2, target_modules=TARGETS)
    needs = lorainit.LoraDA().needs | {"output_second_moment"}
    found = lorainit.collect_statistics(
        models.whisper(torch.float64), config, data=data, needs=needs, progress=False
    )
    sums = {
        f"{name}/{field}": tensor
        for name, layer in found.items()
        for field in FIELDS
        if (tensor := getattr(layer, field)) is not None
    }
    counts = {name: (layer.positions, layer.sequences) for name, layer in found.items()}
    model = lorainit.get_peft_model(
        models.whisper(torch.float64),
        config,
        method=lorainit.LoraDA(population=100),
        data=data,
        precision="exact",
        progress=False,
        autocast_adapter_dtype=False,
    )
    factors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    return {"sums": sums, "counts": counts}, factors


def tensor_parallel(rank: int, size: int, folder: str) -> str:
    """What is said of a model that transformers itself has split over the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(Path(folder), tp_plan="auto")
    assert any(hasattr(p, "device_mesh") for p in model.parameters())
    try:
        lorainit.get_peft_model(
            model,
            LoraConfig(r=2, target_modules=["q_proj"]),
            method=lorainit.PiSSA(),
            progress=False,
        )
    except lorainit.errors.AdapterError as error:
        return str(error)
    return "served"


def compared_on_some(rank: int, size: int, few: bool) -> tuple[dict[str, float], Any]:
    """What is measured of Natural's start, and its factors; lengths compared on some of the sequences."""
    from lorainit.adapters.origin import origin_of
    from lorainit.calibration import held_out_loss
    from tests.adapters.tiny import config, llama
    from tests.test_refinement import sequences

    held_out_loss._SEQUENCES, held_out_loss._LABELS = (4, 8) if few else (10**6, 10**6)
    data = sequences(48)
    mine = data[:5] if rank == 0 else data[5:]
    model = lorainit.get_peft_model(
        llama(),
        config(r=4),
        method=lorainit.Natural(),
        data=mine if size > 1 else data,
        calibration_share=0.5,
        progress=False,
    )
    factors = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    return origin_of(model, "default").measured, factors
