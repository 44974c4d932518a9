"""A Gemma 3 decoder that trains several LoRA adapters at once over one frozen base.

As `StackedLlama`, with what Gemma has besides: embeddings times the root of the width, norms that multiply
by ``1 + w``, one before and one after attention and MLP, queries and keys normalized by heads, a gate by
GELU, two rotary bases, and layers that see a window of the past. The head's 262,144 columns are taken in
pieces: their logits are never all there at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.training import llama
from benchmarks.quality.training.adapters import Adapters, StackedLinear
from benchmarks.quality.training.optimizer import adamw

KINDS = ("sliding_attention", "full_attention")
"""Of layers, in the order of `StackedGemma.rotation`."""

PIECE = 2**27
"""Most logits at once, in numbers."""


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """In float32, rounded once, at the end."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * gain).to(x.dtype)


def _add_norms(
    x: Tensor, y: Tensor, after: Tensor, before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual sum ``x + norm(y)`` in the dtype of `x`; the norm of that in the dtype of `y`."""
    total = x + _norm(y.float(), after, eps)
    return total.to(x.dtype), _norm(total, before, eps).to(y.dtype)


def _gated(merged: Tensor) -> Tensor:
    gate, up = merged.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def _rotate(
    qkv: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, rows: int, heads: int, kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As for Llama, of queries and keys normalized by heads; gains ``(2, head_dim)``: theirs."""
    width = cos.shape[-1]
    split = qkv.unflatten(-1, (-1, width))
    each = torch.cat((gains[:1].expand(heads, -1), gains[1:].expand(kv_heads, -1)))
    normed = _norm(split[..., : heads + kv_heads, :], each, eps)
    merged = torch.cat((normed, split[..., heads + kv_heads :, :]), dim=-2).flatten(-2)
    return llama._rotate(merged, cos, sin, rows, heads, kv_heads)


class PiecewiseLoss(torch.autograd.Function):
    """Cross-entropy and correctness of ``(n, width)`` hidden rows under a head ``(words, width)``.

    The gradient to the hidden rows is known up to a factor a row while a piece's logits are there, so it is
    taken then, and nothing of the size of the logits is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rows: int) -> Any:
        losses, right, gradients = [], [], []
        for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = (h @ head.mT).float()
            wanted = target[:, None]
            total = logits.logsumexp(-1, keepdim=True)
            losses.append((total - logits.gather(1, wanted))[:, 0])
            right.append(logits.argmax(-1) == target)
            if ctx.needs_input_grad[0]:
                shares = logits.sub_(total).exp_()
                shares.scatter_add_(1, wanted, torch.full_like(total, -1.0))
                gradients.append(shares.to(head.dtype) @ head)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        correct = torch.cat(right)
        ctx.mark_non_differentiable(correct)
        return torch.cat(losses), correct

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor, d_correct: Tensor) -> Any:
        del d_correct
        (gradient,) = ctx.saved_tensors
        return (d_losses[:, None] * gradient).to(gradient.dtype), None, None, None


class StackedGemma:
    """The frozen base of a ``Gemma3ForCausalLM``, with its own copy of the weights.

    Args:
        model: read, never changed; no biases, no caps on logits, causal.
        dtype: of weights and activations; the residual sum is float32, as under autocast.
        fuse: elementwise parts as fused kernels (accelerators).
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, *, fuse: bool) -> None:
        config = model.config
        for name in (
            "final_logit_softcapping", "attn_logit_softcapping", "attention_bias",
            "use_bidirectional_attention",
        ):  # fmt: skip
            if getattr(config, name, None):
                raise ValueError(f"this forward knows no {name}; the model's configuration has it")
        self.dtype, self.config = dtype, config
        self.extras: dict[str, tuple[int, ...]] = {}
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.window = config.rms_norm_eps, config.sliding_window
        self.attention_scale = config.query_pre_attn_scalar**-0.5
        self.embedding_scale = config.hidden_size**0.5
        self.device = next(model.parameters()).device
        table = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        self.embedding = table.detach().to(dtype)
        self.head = self.embedding if head is table else head.detach().to(dtype)
        self.rotary = model.model.rotary_emb
        self.final_norm = _gain(model.model.norm)
        self.rotate, self.gated, self.add_norms, self.update = _rotate, _gated, _add_norms, adamw
        if fuse:
            from benchmarks.quality.training import fused_gemma, fused_kernels

            self.rotate, self.gated = fused_gemma.rotate, fused_gemma.gated
            self.add_norms, self.update = fused_gemma.add_norms, fused_kernels.adamw
        self.kinds = [KINDS.index(kind) for kind in config.layer_types]
        self.layers: list[dict[str, Tensor]] = []
        self.shapes: list[tuple[list[str], list[int], int]] = []
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            weights = {
                "before_attention": _gain(layer.input_layernorm),
                "after_attention": _gain(layer.post_attention_layernorm),
                "before_mlp": _gain(layer.pre_feedforward_layernorm),
                "after_mlp": _gain(layer.post_feedforward_layernorm),
                "heads": torch.stack((_gain(attention.q_norm), _gain(attention.k_norm))),
            }
            parts = {
                "qkv": (attention, ["q_proj", "k_proj", "v_proj"], "self_attn"),
                "out": (attention, ["o_proj"], "self_attn"),
                "gate_up": (mlp, ["gate_proj", "up_proj"], "mlp"),
                "down": (mlp, ["down_proj"], "mlp"),
            }
            for key, (module, names, parent) in parts.items():
                members = [getattr(module, name).weight.detach() for name in names]
                weights[key] = torch.cat([w.to(dtype) for w in members])
                full = [f"model.layers.{index}.{parent}.{name}" for name in names]
                self.shapes.append((full, [len(w) for w in members], members[0].shape[1]))
            self.layers.append(weights)

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the two `KINDS`, each ``(2, length, head_dim)`` float32."""
        at = torch.arange(length, device=self.device)[None]
        found = [self.rotary(torch.zeros(1, device=self.device), at, kind) for kind in KINDS]
        cos, sin = zip(*found, strict=True)
        return torch.cat(cos).float(), torch.cat(sin).float()

    def windowed(self, length: int) -> Tensor | None:
        """What a sliding layer sees, ``(length, length)``; None where that is all of the past."""
        if length <= self.window:
            return None
        at = torch.arange(length, device=self.device)
        behind = at[:, None] - at
        return (behind >= 0) & (behind < self.window)

    def hidden(
        self, tokens: Tensor, adapters: Adapters, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``(E, batch, length)`` to the last residual sum's two parts, `y` not normalized."""
        stack, batch, length = tokens.shape
        x = F.embedding(tokens.reshape(stack, -1), self.embedding).float() * self.embedding_scale
        rows, masks = stack * batch, (self.windowed(length), None)
        groups = iter(adapters.groups)
        y: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if y is None:
                h = _norm(x, layer["before_attention"], self.eps).to(self.dtype)
                # Nothing before this point is trained; the products want an input with a gradient.
                h.requires_grad_(torch.is_grad_enabled())
            else:
                after = self.layers[index - 1]["after_mlp"]
                x, h = self.add_norms(x, y, after, layer["before_attention"], self.eps)
            qkv = StackedLinear.apply(h, layer["qkv"], next(groups))
            kind = self.kinds[index]
            cos, sin = rotation[0][kind], rotation[1][kind]
            q, k, v = self.rotate(
                qkv, layer["heads"], cos, sin, rows, self.heads, self.kv_heads, self.eps
            )
            mask = masks[kind]
            attended = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.attention_scale
            )
            attended = attended.transpose(1, 2).reshape(stack, batch * length, -1)
            y = StackedLinear.apply(attended, layer["out"], next(groups))
            x, h = self.add_norms(x, y, layer["after_attention"], layer["before_mlp"], self.eps)
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
        index = llama.at_slots(positions, length).expand(-1, -1, x.shape[-1])
        after = self.layers[-1]["after_mlp"]
        _, picked = self.add_norms(
            x.gather(1, index), y.gather(1, index), after, self.final_norm, self.eps
        )
        rows = max(1, PIECE // len(self.head))
        losses, right = PiecewiseLoss.apply(
            picked.flatten(0, 1), self.head, targets.reshape(-1), rows
        )
        return losses.view(targets.shape), right.view(targets.shape)


def _gain(norm: torch.nn.Module) -> Tensor:
    """What a norm multiplies by, in float32."""
    return 1.0 + norm.weight.detach().float()
