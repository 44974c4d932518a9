"""A small Llama on disk, loaded quantized or plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit.adapters.weights import read_weight
from lorainit.models.pretrained import load_whole

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

METHODS: dict[str, Any] = {
    "displaced": lorainit.LoraDA(),
    "anchored": lorainit.FILet(),
    "anchored-weight": lorainit.PiSSA(),
}

# Relative errors. LLM.int8 rounds a layer's inputs to eight bits as well; bfloat16 has eight bits.
TOLERANCE = {8: 5e-2, 4: 3e-2}


class Bench:
    """A base model on disk, and how to load it, quantized or not."""

    def __init__(self, folder: Path, bits: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.bits, self.folder = bits, folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=128,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                pad_token_id=0,
            )
            model = LlamaForCausalLM(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3.0)
            model.to(torch.bfloat16).save_pretrained(folder / "base")

    def quantized(self) -> Any:
        from transformers import BitsAndBytesConfig, LlamaForCausalLM

        how = BitsAndBytesConfig(
            load_in_8bit=self.bits == 8,
            load_in_4bit=self.bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return load_whole(
            LlamaForCausalLM,
            str(self.folder / "base"),
            quantization_config=how,
            device_map={"": 0 if self.device == "cuda" else "cpu"},
            dtype=torch.bfloat16,
        ).eval()

    def dequantized(self, base: nn.Module) -> Any:
        """A plain model whose weights are those that `base` stores, dequantized."""
        from transformers import LlamaForCausalLM

        plain = load_whole(LlamaForCausalLM, str(self.folder / "base"), dtype=torch.bfloat16)
        plain = plain.to(self.device).eval()
        with torch.no_grad():
            for name, weight in stored(base).items():
                plain.get_submodule(name).weight.copy_(weight)
        return plain

    def batch(self, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 128, (8, 16), generator=generator)
        mask = (torch.arange(16) < torch.randint(8, 17, (8, 1), generator=generator)).long()
        labels = ids.masked_fill(mask == 0, -100)
        found = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
        return {key: value.to(self.device) for key, value in found.items()}

    def started(self, method: str, base: nn.Module | None = None) -> PeftModel:
        base = self.quantized() if base is None else base
        return lorainit.get_peft_model(
            base, lora(), method=METHODS[method], data=[self.batch()], progress=False
        )

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        batch = self.batch(9)
        kept = batch["attention_mask"].bool()
        found: Tensor = model.eval()(**batch).logits[kept].float()
        return found


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


def stored(base: nn.Module) -> dict[str, Tensor]:
    """Every quantized layer's weight as it is stored now, dequantized."""
    # An adapter's own layer is in the base's place.
    layers = {
        name.removeprefix("base_model.model."): getattr(module, "base_layer", module)
        for name, module in base.named_modules()
        if name.split(".")[-1] in TARGETS
    }
    return {name: read_weight(module, name).clone() for name, module in layers.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
