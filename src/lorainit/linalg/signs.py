"""Signs of vectors, fixed."""

from __future__ import annotations

import torch
from torch import Tensor


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns of ``(..., n, k)`` with their entry of largest absolute value made positive."""
    return vectors * column_signs(vectors)


def fix_pair_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Paired columns with the signs of ``v`` fixed as in `fix_signs`, and those of ``u`` with them."""
    signs = column_signs(v)
    return u * signs, v * signs


def fix_triplet_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fix_pair_signs`, with the values between."""
    signs = column_signs(v)
    return u * signs, s, v * signs


def column_signs(vectors: Tensor) -> Tensor:
    """``(..., 1, k)``: the sign of every column's entry of largest absolute value, never zero."""
    index = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = vectors.gather(-2, index).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)
