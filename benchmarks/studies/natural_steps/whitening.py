"""Gradients whitened by both Kronecker factors, cut to a rank, and mapped back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.natural_steps.displacement import LowRank


def cholqr(x: Tensor) -> Tensor:
    for _ in range(2):
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(
            1e-14 * gram.diagonal(dim1=-2, dim2=-1).sum(-1, True) + 1e-300
        )
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, x, upper=True, left=False)
    return x


def top_svd(m: Tensor, k: int, iterations: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    v = torch.randn(m.shape[-1], k + 12, generator=gen, dtype=torch.float64).to(m)
    v = v.expand(*m.shape[:-2], *v.shape)
    for _ in range(iterations):
        v = cholqr(m.mT @ cholqr(m @ v))
    return small_svd(m @ v, v.mT, k)


def shrunk(m: Tensor, s: Tensor) -> Tensor:
    """Singular values with white noise taken out (Gavish, Donoho 2017, Frobenius loss)."""
    rows, columns = sorted(m.shape[-2:])
    k = s.shape[-1]
    noise = (m.square().sum((-2, -1)) - s.square().sum(-1)) / ((rows - k) * (columns - k))
    y = s / (noise * columns).sqrt()[:, None]
    beta = rows / columns
    inside = ((y.square() - beta - 1).square() - 4 * beta).clamp_min(0).sqrt() / y
    return (
        torch.where(y > 1 + beta**0.5, inside, torch.zeros_like(inside))
        * (noise * columns).sqrt()[:, None]
    )


def small_svd(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k SVD of left @ right with few columns."""
    ql, qr = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(ql.R @ qr.R.mT)
    return (ql.Q @ u)[..., :k], s[..., :k], (qr.Q @ vh.mT)[..., :k]


@dataclass
class Group:
    """Layers of one shape: names, roots and whitened gradient, all stacked."""

    names: list[str]
    x_root: Tensor
    y_root: Tensor
    step: Tensor  # whitened, -Ly^-1 G Lx^-T


def groups_of(statistics: Any, damping: float) -> list[Group]:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, layer in statistics.items():
        shapes.setdefault(tuple(layer.gradient_sum.shape), []).append(name)
    out = []
    for names in shapes.values():

        def root(field: str, names: list[str] = names) -> Tensor:
            s = torch.stack([getattr(statistics[n], field).double() for n in names])
            lam = damping * s.diagonal(dim1=-2, dim2=-1).mean(-1)
            s.diagonal(dim1=-2, dim2=-1).add_(lam[:, None])
            return torch.linalg.cholesky(s)

        g = torch.stack([statistics[n].gradient.double() for n in names])
        x, y = root("input_second_moment"), root("output_second_moment")
        half = torch.linalg.solve_triangular(y, -g, upper=False)
        m = torch.linalg.solve_triangular(x.mT, half, upper=True, left=False)
        out.append(Group(names, x, y, m))
    return out


def terms(groups: list[Group], lefts: list[Tensor], rights: list[Tensor]) -> dict[str, LowRank]:
    """Whitened factors mapped back, as displacements by layer."""
    out = {}
    for g, l, r in zip(groups, lefts, rights, strict=True):
        left = torch.linalg.solve_triangular(g.y_root.mT, l, upper=True).float()
        right = torch.linalg.solve_triangular(g.x_root, r, upper=False, left=False).float()
        for i, name in enumerate(g.names):
            out[name] = LowRank(left[i], right[i])
    return out
