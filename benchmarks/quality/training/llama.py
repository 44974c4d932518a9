"""A Llama decoder that trains several LoRA adapters at once over one frozen base.

``E`` adapters of one shape share every base product: activations are ``(E, rows, width)``, the base
weight multiplies all rows in one GEMM, and each adapter adds its own ``s x A_e^T B_e^T`` by batched
products. Gradients of one adapter never meet another's, so the result is that of ``E`` separate
runs. Layers that read one tensor (q/k/v; gate/up) are one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.training.adapters import Adapters, StackedLinear, scored
from benchmarks.quality.training.optimizer import adamw


def _rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(rows, heads, length, head_dim)`` from the merged projection."""
    length, width = cos.shape
    split = qkv.reshape(rows, length, heads + 2 * kv_heads, width)
    both = split[:, :, : heads + kv_heads].float()
    half = width // 2
    turned = torch.cat((-both[..., half:], both[..., :half]), dim=-1)
    both = (both * cos[:, None] + turned * sin[:, None]).to(qkv.dtype)
    repeats = heads // kv_heads

    def repeated(x: Tensor) -> Tensor:
        shape = (rows, length, kv_heads, repeats, width)
        return x[:, :, :, None].expand(shape).reshape(rows, length, heads, width).transpose(1, 2)

    query = both[:, :, :heads].transpose(1, 2)
    return query, repeated(both[:, :, heads:]), repeated(split[:, :, heads + kv_heads :])


def _gated(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, dim=-1)
    return F.silu(gate) * up


def _add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum in the dtype of `x`; its norm, times the weight, in that of `y`."""
    total = x + y
    return total, _norm(total, weight, eps).to(y.dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed.to(weight.dtype).float()).to(weight.dtype)


class StackedLlama:
    """The frozen base of a ``LlamaForCausalLM``, with its own copy of the weights.

    Args:
        model: read, never changed; grouped-query attention, no biases.
        dtype: of weights and activations; the residual sum is float32, as under autocast.
        fuse: elementwise parts as fused kernels (accelerators).
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, *, fuse: bool) -> None:
        config = model.config
        self.dtype, self.config = dtype, config
        self.extras: dict[str, tuple[int, ...]] = {}
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.device = next(model.parameters()).device
        self.embedding = model.get_input_embeddings().weight.detach().to(dtype)
        self.head = model.get_output_embeddings().weight.detach().to(dtype)
        self.rotary = model.model.rotary_emb
        self.final_norm = model.model.norm.weight.detach().to(dtype)
        self.rotate, self.gated, self.add_norm, self.update = _rotate, _gated, _add_norm, adamw
        if fuse:
            from benchmarks.quality.training import fused_kernels as fused

            self.rotate, self.gated = fused.rotate, fused.gated
            self.add_norm, self.update = fused.add_norm, fused.adamw
        self.layers: list[dict[str, Tensor]] = []
        self.shapes: list[tuple[list[str], list[int], int]] = []
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            parts = {
                "qkv": (attention, ["q_proj", "k_proj", "v_proj"], "self_attn"),
                "out": (attention, ["o_proj"], "self_attn"),
                "gate_up": (mlp, ["gate_proj", "up_proj"], "mlp"),
                "down": (mlp, ["down_proj"], "mlp"),
            }
            weights = {
                "norm1": layer.input_layernorm.weight.detach().to(dtype),
                "norm2": layer.post_attention_layernorm.weight.detach().to(dtype),
            }
            for key, (module, names, parent) in parts.items():
                members = [getattr(module, name).weight.detach() for name in names]
                weights[key] = torch.cat([w.to(dtype) for w in members])
                full = [f"model.layers.{index}.{parent}.{name}" for name in names]
                self.shapes.append((full, [len(w) for w in members], members[0].shape[1]))
            self.layers.append(weights)

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each ``(length, head_dim)`` float32."""
        at = torch.arange(length, device=self.device)[None]
        cos, sin = self.rotary(torch.zeros(1, device=self.device), at)
        return cos[0].float(), sin[0].float()

    def hidden(
        self, tokens: Tensor, adapters: Adapters, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``(E, batch, length)`` to the last residual sum's two parts, unnormalized."""
        stack, batch, length = tokens.shape
        x = F.embedding(tokens.reshape(stack, -1), self.embedding).float()
        rows = stack * batch
        groups = iter(adapters.groups)
        y: Tensor | None = None
        for layer in self.layers:
            if y is None:
                h = _norm(x, layer["norm1"], self.eps)
                # Nothing before this point is trained; the products want an input with a gradient.
                h.requires_grad_(torch.is_grad_enabled())
            else:
                x, h = self.add_norm(x, y, layer["norm1"], self.eps)
            qkv = StackedLinear.apply(h, layer["qkv"], next(groups))
            q, k, v = self.rotate(qkv, *rotation, rows, self.heads, self.kv_heads)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            attended = attended.transpose(1, 2).reshape(stack, batch * length, -1)
            y = StackedLinear.apply(attended, layer["out"], next(groups))
            x, h = self.add_norm(x, y, layer["norm2"], self.eps)
            merged = StackedLinear.apply(h, layer["gate_up"], next(groups))
            y = StackedLinear.apply(self.gated(merged), layer["down"], next(groups))
        return x, y

    def token_losses(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        adapters: Adapters,
        rotation: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of every label slot, each ``(E, batch, slots)``.

        Right padding needs no mask: it stands after every position that is read.
        """
        length = tokens.shape[-1]
        x, y = self.hidden(tokens, adapters, rotation)
        index = at_slots(positions, length).expand(-1, -1, x.shape[-1])
        _, picked = self.add_norm(x.gather(1, index), y.gather(1, index), self.final_norm, self.eps)
        logits = (picked.reshape(-1, picked.shape[-1]) @ self.head.mT).float()
        return scored(logits, targets)


def at_slots(positions: Tensor, length: int) -> Tensor:
    """Positions ``(E, batch, slots)`` in rows of this length as places in all tokens: ``(E, all, 1)``."""
    start = torch.arange(positions.shape[1], device=positions.device)[:, None] * length
    return (positions + start).flatten(1).unsqueeze(-1)
