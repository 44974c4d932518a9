"""Where iterating is quicker than decomposing, and on what arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit.linalg import subspace_iteration

DENSE_LIMIT = 768
"""Up to this size a dense eigen- or singular value decomposition is as quick as iterating (CPU)."""

OPERATOR_LIMIT = 224
"""The same of the eigenvectors of a matrix that is never formed: forming it takes as long as they do (CPU)."""

DENSE_LIMIT_CUDA = 128
"""The same on CUDA, where small dense decompositions wait for one another."""


def dense_limit(like: Tensor) -> int:
    """Up to which size a dense decomposition is as quick as iterating, on this tensor's device."""
    return DENSE_LIMIT_CUDA if like.is_cuda else DENSE_LIMIT


def iterates(like: Tensor) -> bool:
    """Whether ``(..., n, m)`` is large enough for operators that are never formed."""
    return like.shape[-2] > (DENSE_LIMIT_CUDA if like.is_cuda else OPERATOR_LIMIT)


def has_matrix_units(like: Tensor) -> bool:
    """Whether this tensor's device multiplies half precision far more quickly than float32."""
    return like.is_cuda


def on_matrix_units(matrix: Tensor) -> bool:
    """Whether large products with this matrix are quickest in `SplitMatrix`."""
    return matrix.dtype == torch.float32 and has_matrix_units(matrix)


def block_width(like: Tensor, k: int) -> int:
    """Columns of an iteration's block: on CUDA as many as come at no cost, in whole eights."""
    width = k + subspace_iteration.OVERSAMPLING
    return max(subspace_iteration.BATCHED_ON_CUDA, -(-width // 8) * 8) if like.is_cuda else width
