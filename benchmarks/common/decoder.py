"""Decoders with random weights, their batches, and the floor under every pass over them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; its projections in so many bits by HQQ, if any."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    bits: int = 0


def width(hidden: int) -> Shape:
    """One decoder layer with Llama's proportions."""
    heads = max(2, hidden // 128)
    return Shape(hidden, hidden * 43 // 16, 1, heads, heads, 1000)


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-2-70b, 4 bits": Shape(8192, 28672, 80, 64, 8, 32000, bits=4),
    "tiny, 4 bits": Shape(64, 192, 2, 4, 2, 257, bits=4),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "tiny": Shape(64, 176, 2, 4, 2, 257),
    **{f"width {n}": width(n) for n in (32, 64, 1024, 2048, 4096, 8192)},
}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: unique; what is recorded under it is not measured again.
        kind: which function of `parts` or `peers` measures it.
        layers: decoder layers, where not all of the shape's.
        zipf: tokens by Zipf's law, where not all alike.
        cap_of: name of the case whose peak this one must stay below.
        limit: seconds after which it is stopped.
        offloaded: whether the weights wait on the host.
    """

    name: str
    kind: str
    shape: str
    layers: int = 0
    sequences: int = 256
    tokens: int = 512
    batch: int = 8
    method: str = "lora_da"
    rank: int = 8
    zipf: bool = False
    cap_of: str = ""
    limit: int = 60
    options: dict[str, Any] = field(default_factory=dict)
    offloaded: bool = False

    def sizes(self) -> Shape:
        """The model's shape."""
        shape = SHAPES[self.shape]
        return replace(shape, layers=self.layers) if self.layers else shape


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(shape: Shape, device: torch.device) -> LlamaForCausalLM:
    """A frozen model with random weights, made where it will lie: bfloat16 on an accelerator."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        use_cache=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    torch.manual_seed(0)
    if shape.bits:
        quantize(model, shape.bits, device)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.tie_weights()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantize(model: nn.Module, bits: int, device: torch.device) -> None:
    """Projections in HQQ's form, in groups of 64, one after the other: whole, they might not fit.

    Those without values get random ones.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    # As for training: a graph keeps no weights that were made full again.
    HQQLinear.set_backend(HQQBackend.PYTORCH_BACKPROP)
    form = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    # To the nearest value: what it rounds is random.
    form["weight_quant_params"]["optimize"] = False
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name in PROJECTIONS:
                dtype = layer.weight.dtype
                if layer.weight.is_meta:
                    layer = layer.to_empty(device=device)
                    layer.weight.normal_(0, 0.02)
                packed = HQQLinear(layer, form, compute_dtype=dtype, device=str(device))
                setattr(module, name, packed)


def batches_of(case: Case) -> list[dict[str, Tensor]]:
    """Random tokens, every one a label; no padding, as in the floor."""
    vocabulary = case.sizes().vocabulary
    generator = torch.Generator().manual_seed(1)
    count = case.sequences * case.tokens
    if case.zipf:
        weights = torch.arange(1, vocabulary + 1, dtype=torch.float64).reciprocal()
        ids = torch.multinomial(weights, count, replacement=True, generator=generator)
    else:
        ids = torch.randint(0, vocabulary, (count,), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.reshape(case.sequences, case.tokens).split(case.batch)
    ]


def config(case: Case, **more: Any) -> LoraConfig:
    """All seven projections."""
    return LoraConfig(
        r=case.rank, lora_alpha=16, use_rslora=True, target_modules=list(PROJECTIONS), **more
    )


def floor(model: nn.Module, batches: list[dict[str, Tensor]], device: torch.device) -> None:
    """Forward and backward with the gradients of whatever weights require them."""
    for batch in batches:
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        model(**moved).loss.backward()
