"""How far two subspaces are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def sine_between(first: Tensor, second: Tensor) -> float:
    """Sine of the largest principal angle of two column spaces, of two stacks the largest.

    Without a difference of ones, so small angles are exact.
    """
    u, v = torch.linalg.qr(first)[0], torch.linalg.qr(second)[0]
    return float(torch.linalg.matrix_norm(v - u @ (u.mT @ v), ord=2).max())
