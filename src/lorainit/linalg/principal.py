"""Principal directions of a sample of features."""

from __future__ import annotations

import torch
from torch import Tensor


def centred_basis(features: Tensor, *, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, principal directions and variances of features.

    Args:
        features: ``(n, in)``.
        centre: take the mean away; if not, it is zero.

    Returns:
        ``(in,)`` mean, ``(k, in)`` orthonormal directions and ``(k,)`` variances above rounding, float64.
    """
    x = features.double()
    mean = x.mean(0) if centre else x.new_zeros(x.shape[1])
    x = x - mean
    count, width = x.shape
    if count < width:
        squares, left = torch.linalg.eigh(x @ x.mT)
    else:
        squares, left = torch.linalg.eigh(x.mT @ x)
    kept = squares > 1e-12 * squares[-1].clamp_min(torch.finfo(x.dtype).tiny)
    squares, left = squares[kept], left[:, kept]
    directions = (left.mT @ x) / squares.sqrt().unsqueeze(-1) if count < width else left.mT
    return mean, directions, squares / count
