"""A base in 4 bits, and with an adapter that gives back what quantization took: no training."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

import lorainit
from benchmarks.common.models import load_smollm2, smollm2_folder
from benchmarks.common.tasks import batches
from benchmarks.demo.run import Clock, Data, adapter_config, score_held_out
from benchmarks.demo.settings import Settings


def run_four_bits(settings: Settings, data: Data) -> dict[str, float]:
    """Held-out losses of the NF4 base alone and with QERA's adapter, and the adapter's seconds."""
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = load_smollm2(quantization_config=how, device_map={"": "cpu"})
    alone = score_held_out(base, settings, data, "4-bit base")
    clock = Clock()
    clock.start()
    model = lorainit.get_peft_model(
        base,
        adapter_config(settings),
        method=lorainit.QERA(),
        data=batches(data.statistics, settings.statistics_batch, data.collate),
        reference_weights=str(smollm2_folder()),
    )
    clock.stop()
    given_back = score_held_out(model, settings, data, "4-bit base, given back")
    return {
        "loss": alone.loss,
        "loss_given_back": given_back.loss,
        "exact_match": alone.exact_match,
        "exact_match_given_back": given_back.exact_match,
        "init_seconds": clock.wall,
    }
