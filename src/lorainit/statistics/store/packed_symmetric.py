"""Symmetric matrices as their upper triangle, row after row, and whole again to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit.linalg.block_triangle import mirror

_BLOCK = 512


def packed_size(width: int) -> int:
    """Numbers in the upper triangle of a matrix of this width, diagonal included."""
    return width * (width + 1) // 2


def is_symmetric(matrix: Tensor) -> bool:
    """Whether ``(n, n)`` is its own transpose to the bit; zeros of either sign are the same."""
    width = matrix.shape[-1]
    return all(
        torch.equal(matrix[low : low + _BLOCK, low:], matrix[low:, low : low + _BLOCK].mT)
        for low in range(0, width, _BLOCK)
    )


def pack(matrix: Tensor) -> Tensor:
    """The upper triangle of ``(n, n)``, row after row."""
    return torch.cat([matrix[row, row:] for row in range(matrix.shape[-1])])


def unpack(packed: Tensor, width: int) -> Tensor:
    """The ``(width, width)`` matrix of `pack`.

    Raises:
        ValueError: of another size.
    """
    if packed.shape != (packed_size(width),):
        raise ValueError(
            f"a triangle of width {width} has {packed_size(width)} numbers, not {packed.numel()}"
        )
    matrix = packed.new_empty(width, width)
    begin = 0
    for row in range(width):
        end = begin + width - row
        matrix[row, row:] = packed[begin:end]
        begin = end
    return mirror(matrix)
