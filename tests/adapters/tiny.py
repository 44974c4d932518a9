"""Tiny models and batches for tests that run PEFT for real."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorainit

VOCABULARY = 64
METHODS = {
    "displaced": lorainit.LoraDA(),
    "anchored": lorainit.FILet(),
    "anchored-weight": lorainit.PiSSA(),
    "zero-b": lorainit.EVA(rho=1.0),
    "default": lorainit.Vanilla(),
}


def llama(
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 2,
    width: int = 32,
) -> Any:
    """A Llama of two layers with grouped-query attention, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 3 // 2,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).to(dtype).eval()


def batch(rows: int = 6, length: int = 10, seed: int = 1) -> dict[str, Tensor]:
    """Ragged rows of random tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def config(**changes: Any) -> LoraConfig:
    """Rank 4 on every linear layer, with a scaling of 2."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return LoraConfig(**(settings | changes))


def start(
    model: nn.Module, method: Any, lora: LoraConfig | None = None, **arguments: Any
) -> PeftModel:
    """`lorainit.get_peft_model` on one batch, quietly."""
    arguments = {"data": [batch()], "progress": False} | arguments
    lora = config() if lora is None and "adapter_name" not in arguments else lora
    return lorainit.get_peft_model(model, lora, method=method, **arguments)


def train(model: nn.Module, steps: int = 3, rate: float = 0.05, seed: int = 2) -> nn.Module:
    """A few steps of SGD on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(seed=seed + step)).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """In eval mode, at the positions that are not padding."""
    training = model.training
    inputs = batch(seed=9) if inputs is None else inputs
    out = model.eval()(**inputs).logits
    model.train(training)
    return out[inputs["attention_mask"].bool()]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers that are the base model's, by its own names."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        re.sub(r"(\.base_layer|\.original_module)+\.", ".", name): tensor.detach().clone()
        for name, tensor in base.state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def fresh_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def run_fresh(code: str, **values: Any) -> Any:
    """Run code in a new interpreter; `values` are its globals, its global `result` comes back."""
    text = "\n".join(
        [
            "import json, sys, warnings, os",
            "warnings.filterwarnings('ignore')",
            f"globals().update(json.loads({json.dumps(values, default=str)!r}))",
            textwrap.dedent(code),
            "print('RESULT' + json.dumps(result))",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])
