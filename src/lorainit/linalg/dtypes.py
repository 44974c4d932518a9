"""Dtypes of sums."""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def sum_dtype(operand: torch.dtype) -> torch.dtype:
    """Dtype of a sum of products of operands of this dtype."""
    return torch.float64 if operand == torch.float64 else torch.float32
