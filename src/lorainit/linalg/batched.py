"""Stacks of matrices, of which some are one and the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorainit.linalg.checks import compute_dtype


def once(work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """`work` on a stack of matrices ``(..., m, n)``, once for those along an expanded dimension.

    Args:
        work: gives a tensor with the same leading dimensions.
        stack: what `LayerStatistics.stack` expanded has stride zero there.
    """
    narrow = stack
    for dim in range(stack.dim() - 2):
        if stack.stride(dim) == 0 and stack.shape[dim] > 1:
            narrow = narrow.narrow(dim, 0, 1)
    if narrow is stack:
        return work(stack)
    found = work(narrow)
    leading = stack.dim() - 2
    return found.expand(*stack.shape[:-2], *found.shape[leading:])


def product(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrix @ block``; one matrix times several blocks, where it is expanded over them.

    Or where the blocks have one dimension more, in front.
    """
    if block.dim() > matrix.dim():
        found = product(matrix, block.movedim(0, -2).flatten(-2))
        return found.reshape(*found.shape[:-1], len(block), -1).movedim(-2, 0)
    if not (matrix.dim() == 4 and matrix.stride(1) == 0 and matrix.shape[1] > 1):
        return matrix @ block
    groups, number, rows, width = block.shape
    beside = block.transpose(1, 2).reshape(groups, rows, number * width)
    found = matrix[:, 0] @ beside
    return found.reshape(groups, -1, number, width).transpose(1, 2)


def gram(matrix: Tensor) -> Tensor:
    """``M^T M``; of half precision on CUDA by the matrix units, exact products summed in float32."""
    if matrix.is_cuda and matrix.dtype in (torch.float16, torch.bfloat16):
        stack = matrix.flatten(0, -3) if matrix.dim() > 2 else matrix.unsqueeze(0)
        product = torch.stack([torch.mm(m.mT, m, out_dtype=torch.float32) for m in stack])
        return product.reshape(*matrix.shape[:-2], *product.shape[-2:])
    wide = matrix.to(compute_dtype(matrix))
    return wide.mT @ wide


def double_precision(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no float64 (MPS)."""
    return once(lambda t: t.cpu().double() if t.device.type == "mps" else t.double(), tensor)
