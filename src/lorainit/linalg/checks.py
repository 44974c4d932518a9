"""Dtypes, ranks, and input that is not finite."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorainit.errors import NonFiniteError, RankError


class _Typed(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...


def compute_dtype(*tensors: _Typed) -> torch.dtype:
    """float64 if any of the tensors is, else float32: half precision is never solved in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_finite(tensor: Tensor) -> Tensor:
    """Whether every value is finite, as a 0-dim tensor: one read, no copy."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # The largest absolute value carries NaN and infinity along, and so do both ends of the range, which a
    # processor finds ten times as quickly.
    if type(tensor) is Tensor and tensor.device.type == "cpu":
        return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
    return torch.isfinite(torch.linalg.vector_norm(tensor, ord=torch.inf))


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself, or `NonFiniteError` naming `what`."""
    if not bool(all_finite(tensor)):
        raise NonFiniteError(
            f"{what} has values that are not finite. Look at the data and the model's dtype: "
            "float16 overflows where bfloat16 and float32 do not."
        )
    return tensor


def check_rank(rank: int, rows: int, columns: int, *, factor: int = 1) -> None:
    """Raise `RankError` unless ``1 <= factor * rank <= min(rows, columns)``."""
    if rank < 1 or factor * rank > min(rows, columns):
        wanted = f"{factor} x rank = {factor * rank}" if factor > 1 else f"rank {rank}"
        raise RankError(
            f"{wanted} is not between 1 and min(out, in) = {min(rows, columns)} of a "
            f"({rows}, {columns}) weight. Lower the rank (rank_pattern does it for single layers), "
            "or pass cap_rank=True."
        )
