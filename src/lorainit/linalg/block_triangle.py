"""Symmetric sums as their upper block triangle: half the products, and whole again to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

FOLD_FROM = 512
"""From this width a Gram matrix is summed as its upper block triangle."""

_PANELS = 4

_BLOCK = 512


def panels(width: int) -> list[tuple[int, int]]:
    """Bounds of the row panels of a block triangle, a multiple of 128 wide where that is possible."""
    step = -(-width // _PANELS)
    step = -(-step // 128) * 128 if step > 128 else step
    return [(low, min(low + step, width)) for low in range(0, width, step)]


def mirror(matrix: Tensor) -> Tensor:
    """``(n, n)``: what lies below the diagonal comes from above it, in place."""
    width = matrix.shape[-1]
    for low in range(0, width, _BLOCK):
        high = min(low + _BLOCK, width)
        matrix[high:, low:high] = matrix[low:high, high:].mT
        block = matrix[low:high, low:high]
        above = torch.ones_like(block, dtype=torch.bool).triu_()
        block.copy_(torch.where(above, block, block.mT))
    return matrix
