"""Quantized weights as GGUF files store them, in blocks of a row, to float32 by torch alone.

The sums and products are those of the package ``gguf`` in its order, so that every number is the same
(``tests/benchmarks/test_quality_packing.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _half(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()


def _signed(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.int8).float()


def _q4_1(block: Tensor) -> Tensor:
    """Scale and offset, then 32 nibbles, low ones first."""
    quants = block[..., 4:]
    values = torch.cat((quants & 15, quants >> 4), dim=-1).float()
    return _half(block[..., :2]) * values + _half(block[..., 2:4])


def _q5_0(block: Tensor) -> Tensor:
    """A scale, the fifth bits of 32 values, then their nibbles, low ones first; 16 stands for zero."""
    bits = torch.arange(8, dtype=torch.uint8, device=block.device)
    fifth = ((block[..., 2:6, None] >> bits) & 1).flatten(-2)
    quants = block[..., 6:]
    values = torch.cat((quants & 15, quants >> 4), dim=-1) | (fifth << 4)
    return _half(block[..., :2]) * (values.float() - 16)


def _q8_0(block: Tensor) -> Tensor:
    """A scale, then 32 signed bytes."""
    return _half(block[..., :2]) * _signed(block[..., 2:])


def _q4_k(block: Tensor) -> Tensor:
    """Two scales, 8 pairs of 6 bits (a group's scale and offset) in 12 bytes, then 256 nibbles."""
    low, middle, high = block[..., 4:8], block[..., 8:12], block[..., 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=-1).float()
    offsets = torch.cat((middle & 63, (high >> 4) | ((middle >> 2) & 48)), dim=-1).float()
    scales, offsets = _half(block[..., :2]) * scales, _half(block[..., 2:4]) * offsets
    quants = block[..., 16:].unflatten(-1, (4, 32))
    values = torch.stack((quants & 15, quants >> 4), dim=-2).flatten(-3, -2).float()
    return (scales[..., None] * values - offsets[..., None]).flatten(-2)


def _q6_k(block: Tensor) -> Tensor:
    """256 nibbles, their upper two bits, 16 signed bytes (a group's scale), a scale; 32 is zero."""
    quants = block[..., :128].unflatten(-1, (2, 64))
    low = torch.stack((quants & 15, quants >> 4), dim=-2).flatten(-3).unflatten(-1, (8, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=block.device)[:, None]
    pairs = block[..., 128:192].unflatten(-1, (2, 1, 32))
    high = ((pairs >> shifts) & 3).flatten(-3, -2)
    values = (low | (high << 4)).flatten(-2).unflatten(-1, (16, 16)).float() - 32
    scales = _half(block[..., 208:]) * _signed(block[..., 192:208])
    return (scales[..., None] * values).flatten(-2)


BLOCKS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q6_K": (210, _q6_k),
}
"""By GGUF's name of the type: bytes of a block, and what makes its numbers."""


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """``(rows, bytes)`` uint8 to ``(rows, columns)`` float32.

    Raises:
        ValueError: a type that is not in `BLOCKS`.
    """
    if kind not in BLOCKS:
        raise ValueError(f"no weights of the type {kind} can be read (only {', '.join(BLOCKS)})")
    size, unpack = BLOCKS[kind]
    return unpack(raw.unflatten(-1, (-1, size))).flatten(-2)
