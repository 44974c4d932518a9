"""Random matrices, Kronecker products and rank correlation in float64."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float64


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DTYPE)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, generator=generator)).Q


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product, whatever the strides of either."""
    product = torch.einsum("ab,cd->acbd", a, b)
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).to(DTYPE)
    return float(torch.corrcoef(ranks)[0, 1])


def inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


def z_score(sample: Tensor, expected: float = 0.0) -> float:
    """How many standard errors the sample's mean lies above what was expected."""
    return float((sample.mean() - expected) / (sample.std() / len(sample) ** 0.5))


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine between two subspaces: one where they are the same."""
    return float((a.T @ b).square().sum() / a.shape[1])
