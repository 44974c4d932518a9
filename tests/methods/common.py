"""Layers to solve, and ways to compare results, for the checks of the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorainit.methods import METHODS
from lorainit.types import Factors, LayerStatistics

OUT, IN, RANK, SCALING = 14, 22, 4, 2.0


@dataclass(frozen=True)
class Check:
    """One measurement with the bound it has to keep; a control has to exceed it instead."""

    method: str
    name: str
    bound: float
    measure: Callable[[], float]
    control: bool = False

    def passes(self, value: float) -> bool:
        """Whether the measured value is on the right side of the bound."""
        return value > self.bound if self.control else value <= self.bound

    def __str__(self) -> str:
        return f"{self.method}: {self.name}"


def layer(
    *batch: int,
    out: int = OUT,
    inner: int = IN,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, LayerStatistics]:
    """A weight and all its statistics, from correlated inputs and gradients with counts to divide.

    With what quantization took from the weight. Drawn in float64 and rounded last, so that every dtype
    sees the same numbers.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=rng, dtype=torch.float64)

    tokens, sequences = 5 * inner, 7
    x = draw(tokens, inner) @ (draw(inner, inner) * 0.4) + draw(1, inner)
    g = 0.01 * draw(tokens, out) @ (draw(out, out) * 0.4)
    statistics = LayerStatistics(
        gradient_sum=g.mT @ x + 0.5 * draw(out, inner),
        input_second_moment_sum=x.mT @ x,
        input_sum=x.sum(-2),
        output_second_moment_sum=g.mT @ g,
        sequences=sequences,
        label_tokens=tokens,
        positions=tokens,
        population=500.0,
    )
    weight = draw(out, inner) / inner**0.5
    statistics = replace(statistics, weight_error=0.1 * draw(out, inner) / inner**0.5)
    return weight.to(dtype), statistics.to(dtype=dtype)


def solve(
    method: object,
    weight: Tensor,
    statistics: LayerStatistics,
    rank: int = RANK,
    scaling: float = SCALING,
) -> Factors:
    """The method's factors, torch's global generator set first for those that draw."""
    torch.manual_seed(0)
    if isinstance(method, str):
        method = METHODS[method]()
    factors: Factors = method.solve(weight, statistics, rank, scaling)  # type: ignore[attr-defined]
    return factors


def product(factors: Factors, scaling: float = SCALING) -> Tensor:
    """``s B A``, in float64."""
    return scaling * (factors.B.double() @ factors.A.double())


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of what was wanted."""
    scale = float(wanted.double().norm())
    return float((found.double() - wanted.double()).norm()) / (scale if scale > 0 else 1.0)


def projector(vectors: Tensor) -> Tensor:
    """Orthogonal projector on the span of the columns, ``(..., n, n)``."""
    q = torch.linalg.qr(vectors.double()).Q
    return q @ q.mT


def angle(found: Tensor, wanted: Tensor) -> float:
    """Largest sine between two spans of columns."""
    difference = projector(found) - projector(wanted)
    return float(torch.linalg.matrix_norm(difference, 2).max())


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Best rank-``rank`` approximation in the Frobenius norm, by LAPACK in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def tail(matrix: Tensor, rank: int) -> float:
    """The error of `truncated`: root of the sum of squares of the other singular values."""
    return float(torch.linalg.svdvals(matrix.double())[..., rank:].norm())


def excess(error: float, least: float) -> float:
    """How far an error is from the least possible one, relative to it."""
    return abs(error / least - 1.0)


def root(matrix: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive definite matrix, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.mT


def damped(matrix: Tensor, share: float) -> Tensor:
    """``matrix + share * mean(diagonal) * I``."""
    n = matrix.shape[-1]
    return matrix + share * matrix.trace() / n * torch.eye(n, dtype=matrix.dtype)
