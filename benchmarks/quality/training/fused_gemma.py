"""What Gemma's step has besides Llama's as fused kernels, forward and backward (accelerators only).

Each computes what its plain counterpart in ``gemma.py`` does, with one read and one write of the
activations.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.quality.training import fused_kernels


@triton.jit
def _add_norms_forward(
    x, y, after, before, total, normed, scale_y, scale_total, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    part = tl.load(y + row * width + at, mask, 0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(part * part) / width + eps)
    tl.store(scale_y + row, rstd)
    value = tl.load(x + row * width + at, mask, 0).to(tl.float32)
    value += part * rstd * tl.load(after + at, mask, 0)
    tl.store(total + row * width + at, value.to(total.dtype.element_ty), mask)
    rstd = tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(scale_total + row, rstd)
    value = value * rstd * tl.load(before + at, mask, 0)
    tl.store(normed + row * width + at, value.to(normed.dtype.element_ty), mask)


@triton.jit
def _add_norms_backward(
    d_total, d_normed, total, y, after, before, scale_y, scale_total, d_x, d_y, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    rstd = tl.load(scale_total + row)
    unit = tl.load(total + row * width + at, mask, 0).to(tl.float32) * rstd
    g = tl.load(d_normed + row * width + at, mask, 0).to(tl.float32)
    g = g * tl.load(before + at, mask, 0)
    g = rstd * (g - unit * (tl.sum(g * unit) / width))
    g += tl.load(d_total + row * width + at, mask, 0).to(tl.float32)
    tl.store(d_x + row * width + at, g.to(d_x.dtype.element_ty), mask)
    rstd = tl.load(scale_y + row)
    unit = tl.load(y + row * width + at, mask, 0).to(tl.float32) * rstd
    g = g * tl.load(after + at, mask, 0)
    g = rstd * (g - unit * (tl.sum(g * unit) / width))
    tl.store(d_y + row * width + at, g.to(d_y.dtype.element_ty), mask)


class _AddNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, after: Tensor, before: Tensor, eps: float) -> Any:
        x, y = x.contiguous(), y.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total, normed = torch.empty_like(x), torch.empty_like(y)
        scales = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        _add_norms_forward[(rows,)](
            x, y, after, before, total, normed, scales[0], scales[1], width, eps,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        ctx.save_for_backward(total, y, scales)
        ctx.gains = after, before
        ctx.set_materialize_grads(True)
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> Any:
        total, y, scales = ctx.saved_tensors
        width = total.shape[-1]
        d_x, d_y = torch.empty_like(total), torch.empty_like(y)
        _add_norms_backward[(total.numel() // width,)](
            d_total.contiguous(), d_normed.contiguous(), total, y, *ctx.gains, scales[0],
            scales[1], d_x, d_y, width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return d_x, d_y, None, None, None


@triton.jit
def _share(gate):
    """What GELU's tanh form multiplies by: half of one more than the tanh, as a sigmoid."""
    # Twice the root of 2 / pi.
    return 1 / (1 + tl.exp(-1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)))


@triton.jit
def _gated_forward(merged, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    kind = out.dtype.element_ty
    gate = tl.load(merged + row * 2 * width + at, mask, 0).to(tl.float32)
    up = tl.load(merged + row * 2 * width + width + at, mask, 0).to(tl.float32)
    active = (gate * _share(gate)).to(kind).to(tl.float32)
    tl.store(out + row * width + at, (active * up).to(kind), mask)


@triton.jit
def _gated_backward(merged, d_out, d_merged, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    kind = d_merged.dtype.element_ty
    gate = tl.load(merged + row * 2 * width + at, mask, 0).to(tl.float32)
    up = tl.load(merged + row * 2 * width + width + at, mask, 0).to(tl.float32)
    g = tl.load(d_out + row * width + at, mask, 0).to(tl.float32)
    share = _share(gate)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    d_gate = g * up * (share + gate * share * (1 - share) * slope)
    tl.store(d_merged + row * 2 * width + at, d_gate.to(kind), mask)
    tl.store(d_merged + row * 2 * width + width + at, (g * gate * share).to(kind), mask)


@triton.jit
def _norm_heads_forward(
    qkv, gains, out, eps, HEADS: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = head < HEADS + 2 * KV
    place = (token * (HEADS + 2 * KV) + head) * WIDTH + at
    value = tl.load(qkv + place, mask, 0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
    gain = tl.load(gains + tl.where(head < HEADS, 0, WIDTH) + at)
    value = tl.where(head < HEADS + KV, value * rstd * gain, value)
    tl.store(out + place, value.to(out.dtype.element_ty), mask)


@triton.jit
def _norm_heads_backward(
    d_out, qkv, gains, d_qkv, eps, HEADS: tl.constexpr, KV: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = head < HEADS + 2 * KV
    place = (token * (HEADS + 2 * KV) + head) * WIDTH + at
    value = tl.load(qkv + place, mask, 0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)[:, None]
    unit = value * rstd
    plain = tl.load(d_out + place, mask, 0).to(tl.float32)
    g = plain * tl.load(gains + tl.where(head < HEADS, 0, WIDTH) + at)
    g = rstd * (g - unit * (tl.sum(g * unit, 1)[:, None] / WIDTH))
    g = tl.where(head < HEADS + KV, g, plain)
    tl.store(d_qkv + place, g.to(d_qkv.dtype.element_ty), mask)


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gains: Tensor, heads: int, kv_heads: int, eps: float
    ) -> Tensor:
        qkv, width = qkv.contiguous(), gains.shape[-1]
        every = heads + 2 * kv_heads
        sizes = {"HEADS": heads, "KV": kv_heads, "WIDTH": width}
        sizes["BLOCK"] = triton.next_power_of_2(every)
        out = torch.empty_like(qkv)
        _norm_heads_forward[(qkv.numel() // (every * width),)](qkv, gains, out, eps, **sizes)
        ctx.save_for_backward(qkv)
        ctx.rest = gains, eps, every * width, sizes
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        (qkv,) = ctx.saved_tensors
        gains, eps, row, sizes = ctx.rest
        d_qkv = torch.empty_like(qkv)
        _norm_heads_backward[(qkv.numel() // row,)](
            d_out.contiguous(), qkv, gains, d_qkv, eps, **sizes
        )
        return d_qkv, None, None, None, None


def add_norms(
    x: Tensor, y: Tensor, after: Tensor, before: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``gemma._add_norms``."""
    return _AddNorms.apply(x, y, after, before, eps)


def gated(merged: Tensor) -> Tensor:
    """See ``gemma._gated``."""
    return fused_kernels.Gated.apply(merged, (_gated_forward, _gated_backward))


def rotate(
    qkv: Tensor, gains: Tensor, cos: Tensor, sin: Tensor, rows: int, heads: int, kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``gemma._rotate``."""
    normed = _NormHeads.apply(qkv, gains, heads, kv_heads, eps)
    return fused_kernels.rotate(normed, cos, sin, rows, heads, kv_heads)
