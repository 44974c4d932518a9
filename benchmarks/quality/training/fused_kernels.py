"""The elementwise parts of a Llama step as fused kernels, forward and backward (accelerators only).

Each computes what its plain counterpart in ``stacked.py`` does, with one read and one write of the
activations instead of many: without them they cost more than the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm_forward(
    x, y, weight, total, normed, scale, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    wide = total.dtype.element_ty
    kind = normed.dtype.element_ty
    value = tl.load(x + row * width + at, mask, 0).to(tl.float32)
    value += tl.load(y + row * width + at, mask, 0).to(tl.float32)
    rounded = value.to(wide)
    tl.store(total + row * width + at, rounded, mask)
    value = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(scale + row, rstd)
    unit = (value * rstd).to(kind).to(tl.float32)
    gain = tl.load(weight + at, mask, 0).to(tl.float32)
    tl.store(normed + row * width + at, (unit * gain).to(kind), mask)


@triton.jit
def _add_norm_backward(
    d_total, d_normed, total, weight, scale, d_x, d_y, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    rstd = tl.load(scale + row)
    unit = tl.load(total + row * width + at, mask, 0).to(tl.float32) * rstd
    g = tl.load(d_normed + row * width + at, mask, 0).to(tl.float32)
    g = g * tl.load(weight + at, mask, 0).to(tl.float32)
    g = rstd * (g - unit * (tl.sum(g * unit) / width))
    g += tl.load(d_total + row * width + at, mask, 0).to(tl.float32)
    tl.store(d_x + row * width + at, g.to(d_x.dtype.element_ty), mask)
    tl.store(d_y + row * width + at, g.to(d_y.dtype.element_ty), mask)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Any:
        x, y = x.contiguous(), y.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total, normed = torch.empty_like(x), torch.empty_like(y)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _add_norm_forward[(rows,)](x, y, weight, total, normed, scale, width, eps, BLOCK=block)
        ctx.save_for_backward(total, scale)
        ctx.weight, ctx.dtype = weight, y.dtype
        ctx.set_materialize_grads(True)
        return total, normed

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normed: Tensor) -> Any:
        total, scale = ctx.saved_tensors
        width = total.shape[-1]
        d_x, d_y = torch.empty_like(total), torch.empty_like(total, dtype=ctx.dtype)
        _add_norm_backward[(total.numel() // width,)](
            d_total.contiguous(), d_normed.contiguous(), total, ctx.weight, scale, d_x, d_y, width,
            BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return d_x, d_y, None, None


@triton.jit
def _gated_forward(merged, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    kind = out.dtype.element_ty
    gate = tl.load(merged + row * 2 * width + at, mask, 0).to(tl.float32)
    up = tl.load(merged + row * 2 * width + width + at, mask, 0).to(tl.float32)
    active = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
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
    share = 1 / (1 + tl.exp(-gate))
    d_gate = g * up * share * (1 + gate * (1 - share))
    tl.store(d_merged + row * 2 * width + at, d_gate.to(kind), mask)
    tl.store(d_merged + row * 2 * width + width + at, (g * gate * share).to(kind), mask)


class Gated(torch.autograd.Function):
    """Two kernels of a gate, forward and backward, on gate and input side by side."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, kernels: tuple[Any, Any]) -> Tensor:
        width = merged.shape[-1] // 2
        out = torch.empty(*merged.shape[:-1], width, dtype=merged.dtype, device=merged.device)
        grid = (out.numel() // width, triton.cdiv(width, 1024))
        kernels[0][grid](merged, out, width, BLOCK=1024)
        ctx.save_for_backward(merged)
        ctx.kernel = kernels[1]
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        (merged,) = ctx.saved_tensors
        width = merged.shape[-1] // 2
        d_merged = torch.empty_like(merged)
        grid = (d_out.numel() // width, triton.cdiv(width, 1024))
        ctx.kernel[grid](merged, d_out.contiguous(), d_merged, width, BLOCK=1024)
        return d_merged, None


@triton.jit
def _rotate_forward(
    qkv, cos, sin, query, key, value, length,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = token % length
    head = tl.arange(0, BLOCK)[:, None]
    at = tl.arange(0, HALF)[None, :]
    mask = head < HEADS
    width: tl.constexpr = 2 * HALF
    kind = query.dtype.element_ty
    c0 = tl.load(cos + place * width + at)
    c1 = tl.load(cos + place * width + HALF + at)
    s0 = tl.load(sin + place * width + at)
    s1 = tl.load(sin + place * width + HALF + at)
    source = qkv + token * (HEADS + 2 * KV) * width
    target = token * HEADS * width + head * width + at
    own = head * width + at
    low = tl.load(source + own, mask, 0).to(tl.float32)
    high = tl.load(source + own + HALF, mask, 0).to(tl.float32)
    tl.store(query + target, (low * c0 - high * s0).to(kind), mask)
    tl.store(query + target + HALF, (high * c1 + low * s1).to(kind), mask)
    shared = (HEADS + head // (HEADS // KV)) * width + at
    low = tl.load(source + shared, mask, 0).to(tl.float32)
    high = tl.load(source + shared + HALF, mask, 0).to(tl.float32)
    tl.store(key + target, (low * c0 - high * s0).to(kind), mask)
    tl.store(key + target + HALF, (high * c1 + low * s1).to(kind), mask)
    shared += KV * width
    tl.store(value + target, tl.load(source + shared, mask, 0), mask)
    tl.store(value + target + HALF, tl.load(source + shared + HALF, mask, 0), mask)


@triton.jit
def _rotate_backward(
    d_query, d_key, d_value, cos, sin, d_qkv, length,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = token % length
    row = token // length
    at = tl.arange(0, HALF)[None, :]
    width: tl.constexpr = 2 * HALF
    kind = d_qkv.dtype.element_ty
    c0 = tl.load(cos + place * width + at)
    c1 = tl.load(cos + place * width + HALF + at)
    s0 = tl.load(sin + place * width + at)
    s1 = tl.load(sin + place * width + HALF + at)
    target = d_qkv + token * (HEADS + 2 * KV) * width
    head = tl.arange(0, BLOCK)[:, None]
    mask = head < HEADS
    source = d_query + row * q_row + place * q_token + head * q_head + at
    low = tl.load(source, mask, 0).to(tl.float32)
    high = tl.load(source + HALF, mask, 0).to(tl.float32)
    own = head * width + at
    tl.store(target + own, (low * c0 + high * s1).to(kind), mask)
    tl.store(target + own + HALF, (high * c1 - low * s0).to(kind), mask)
    # Repeated heads send their gradients back to the one they were copied from.
    mask = head < KV
    low = tl.zeros((BLOCK, HALF), tl.float32)
    high = tl.zeros((BLOCK, HALF), tl.float32)
    for i in tl.static_range(HEADS // KV):
        source = d_key + row * k_row + place * k_token + at
        source += (head * (HEADS // KV) + i) * k_head
        low += tl.load(source, mask, 0).to(tl.float32)
        high += tl.load(source + HALF, mask, 0).to(tl.float32)
    shared = (HEADS + head) * width + at
    tl.store(target + shared, (low * c0 + high * s1).to(kind), mask)
    tl.store(target + shared + HALF, (high * c1 - low * s0).to(kind), mask)
    low = tl.zeros((BLOCK, HALF), tl.float32)
    high = tl.zeros((BLOCK, HALF), tl.float32)
    for i in tl.static_range(HEADS // KV):
        source = d_value + row * v_row + place * v_token + at
        source += (head * (HEADS // KV) + i) * v_head
        low += tl.load(source, mask, 0).to(tl.float32)
        high += tl.load(source + HALF, mask, 0).to(tl.float32)
    shared += KV * width
    tl.store(target + shared, low.to(kind), mask)
    tl.store(target + shared + HALF, high.to(kind), mask)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, rows: int, heads: int, kv_heads: int
    ) -> Any:
        length, width = cos.shape
        qkv = qkv.contiguous()
        shape = (rows, length, heads, width)
        outs = [torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3)]
        block = triton.next_power_of_2(heads)
        _rotate_forward[(rows * length,)](
            qkv, cos, sin, *outs, length, HEADS=heads, KV=kv_heads, HALF=width // 2, BLOCK=block
        )
        ctx.rotation = (cos, sin)
        ctx.sizes = (qkv.shape, rows, heads, kv_heads)
        return tuple(out.transpose(1, 2) for out in outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        cos, sin = ctx.rotation
        shape, rows, heads, kv_heads = ctx.sizes
        length, width = cos.shape
        gradients = tuple(g if g.stride(-1) == 1 else g.contiguous() for g in gradients)
        out = torch.empty(shape, dtype=gradients[0].dtype, device=cos.device)
        strides = [s for g in gradients for s in g.stride()[:3]]
        _rotate_backward[(rows * length,)](
            *gradients, cos, sin, out, length, *strides, HEADS=heads, KV=kv_heads, HALF=width // 2,
            BLOCK=triton.next_power_of_2(heads),
        )  # fmt: skip
        return out, None, None, None, None, None


@triton.jit
def _adamw_kernel(
    weights, compute, gradient, first, second, live, scale, rate, step, size,
    MASKED: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    here = adapter * size + at
    count = tl.load(step)
    g = tl.load(gradient + here, mask, 0).to(tl.float32) * tl.load(scale + adapter)
    if MASKED:
        g = g * tl.load(live + at, mask, 0)
    m = tl.load(first + here, mask, 0)
    m += 0.1 * (g - m)
    v = 0.999 * tl.load(second + here, mask, 0) + 0.001 * g * g
    tl.store(first + here, m, mask)
    tl.store(second + here, v, mask)
    # 0.9 ** step and 0.999 ** step, by their logarithms.
    done_first = 1 - tl.exp(-0.10536051565782628 * count)
    done_second = 1 - tl.exp(-0.0010005003335835335 * count)
    change = m / done_first / (tl.sqrt(v / done_second) + 1e-8)
    w = tl.load(weights + here, mask, 0) - tl.load(rate + adapter) * change
    tl.store(weights + here, w, mask)
    if ROUNDED:
        tl.store(compute + here, w.to(compute.dtype.element_ty), mask)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``stacked._add_norm``."""
    return _AddNorm.apply(x, y, weight, eps)


def gated(merged: Tensor) -> Tensor:
    """See ``stacked._gated``."""
    return Gated.apply(merged, (_gated_forward, _gated_backward))


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``stacked._rotate``."""
    return _Rotate.apply(qkv, cos, sin, rows, heads, kv_heads)


def adamw(
    weights: Tensor,
    compute: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    live: Tensor | None,
    scale: Tensor,
    rate: Tensor,
    step: Tensor,
) -> None:
    """See ``stacked.adamw``; also writes the rounded copy."""
    stack, size = weights.shape
    grid = (triton.cdiv(size, 2048), stack)
    _adamw_kernel[grid](
        weights, compute, gradient, first, second, live if live is not None else weights, scale,
        rate, step, size, MASKED=live is not None, ROUNDED=compute is not weights, BLOCK=2048,
    )  # fmt: skip
