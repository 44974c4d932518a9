"""PEFT's own LoftQ, ``peft.replace_lora_weights_loftq``, on a model that bitsandbytes holds in four bits.

It decomposes ``W - Q`` and writes the factors as they come: ``B A`` is what it should be, and the adapter's
``s B A`` is so at ``s = 1`` alone. It reads ``W`` from a safetensors checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq
from peft.tuners.lora import LoraLayer
from peft.utils import loftq_utils
from torch import nn

from benchmarks.quantized.bases import Case
from benchmarks.quantized.recovery_tables import PEFT_ONE, PEFT_OTHER
from lorainit.models.pretrained import load_whole


class _OnTheProcessor(torch.Tensor):
    """A tensor that stays where it is when it is sent to an accelerator that is not there."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("device", None)
        return self.as_subclass(torch.Tensor).to(*args, **kwargs)  # type: ignore[arg-type]


@contextlib.contextmanager
def where_the_model_is(device: torch.device) -> Iterator[None]:
    """On a CPU: PEFT's function names an accelerator for the weights that it reads; they stay here."""
    if device.type == "cuda":
        yield
        return
    read = loftq_utils._SafetensorLoader.get_tensor

    def stays(loader: Any, name: str) -> torch.Tensor:
        return read(loader, name).as_subclass(_OnTheProcessor)

    with mock.patch.object(loftq_utils._SafetensorLoader, "get_tensor", stays):
        yield


def four_bits(full: Any, folder: Path, skipped: Sequence[str], device: torch.device) -> nn.Module:
    """`full` saved in `folder` and loaded in NF4, computing in float32."""
    from transformers import BitsAndBytesConfig

    full.save_pretrained(folder)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(skipped) or None,
    )
    place = device.index or 0 if device.type == "cuda" else "cpu"
    model: nn.Module = load_whole(
        type(full),
        str(folder),
        quantization_config=how,
        device_map={"": place},
        dtype=torch.float32,
    )
    return model.eval()


def started(case: Case, ranks: Sequence[int], device: torch.device) -> PeftModel:
    """The model in four bits with an adapter ``r{rank}`` for each rank, all at ``s = 1``."""
    with tempfile.TemporaryDirectory() as scratch:
        skipped = case.adapter.get("exclude_modules", ())
        # Before any forward, which may lay the four bits out anew.
        base = four_bits(case.full, Path(scratch), skipped, device)
        model: Any = None
        for rank in ranks:
            config = LoraConfig(r=rank, lora_alpha=rank, **case.adapter)
            if model is None:
                model = get_peft_model(base, config, adapter_name=f"r{rank}")
            else:
                model.add_adapter(f"r{rank}", config)
        with where_the_model_is(device):
            for rank in ranks:
                replace_lora_weights_loftq(model, scratch, adapter_name=f"r{rank}")
    return model


def measured(case: Case, ranks: Sequence[int], device: torch.device) -> Iterator[dict[str, Any]]:
    """For each rank the figures at ``s = 1``, and at the scaling of the other starts' adapters."""
    model = started(case, ranks, device)
    with model.disable_adapter():
        before = {f"{name}_before": value for name, value in case.measure(model).items()}
    for rank in ranks:
        name = f"r{rank}"
        model.set_adapter(name)
        for method, scaling in ((PEFT_ONE, 1.0), (PEFT_OTHER, 16 / math.sqrt(rank))):
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale(name, scaling)
            yield {
                "method": method, "rank": rank, "s": scaling, **before, **case.measure(model),
            }  # fmt: skip
