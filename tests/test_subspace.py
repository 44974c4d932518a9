"""Filtered subspace iteration against dense float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorainit.linalg import subspace_iteration

N, K, WIDTH = 300, 6, 22


def orthogonal(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(N, N, generator=rng, dtype=torch.float64)).Q


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(N, WIDTH, generator=rng, dtype=torch.float64).to(dtype)


def sine(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.matrix_norm(found - wanted @ (wanted.mT @ found), 2).max())


def residual_of(matrix: Tensor, found: subspace_iteration.Ritz) -> Tensor:
    vectors, values = found.vectors[..., :K], found.values[..., None, :K].to(found.vectors)
    return (matrix @ vectors - vectors * values).norm(dim=-2)


SPECTRA = {
    "flat": torch.linspace(0, 1, N).double(),
    "negative too": torch.linspace(-5, 1, N).double(),
    "six stand out": torch.cat([torch.rand(N - 6).double().sort()[0], torch.arange(2.0, 8.0)]),
    "one far out": torch.cat([torch.linspace(0, 1, N - 1), torch.tensor([1e6])]).double(),
    "twelve equal": torch.cat([torch.linspace(0, 1, N - 12).double(), 2 * torch.ones(12)]),
}


@pytest.mark.parametrize("name", list(SPECTRA))
def test_leading_pairs(name: str) -> None:
    values, q = SPECTRA[name].double(), orthogonal()
    matrix = (q * values) @ q.mT
    allowed = 1e-9 * values[-1]
    found = subspace_iteration.filtered(
        matrix.matmul,
        subspace_iteration.symmetric_ritz(matrix.matmul, K, lambda v: allowed.expand_as(v)),
        start(),
        K,
        lower=values[0],
    )
    assert found.converged
    assert float(residual_of(matrix, found).max()) <= float(allowed)
    assert torch.allclose(found.values[:K], values.flip(0)[:K], atol=1e-8 * float(values[-1]))
    kept = q[:, -12:] if name == "twelve equal" else q[:, -K:]
    # A gap of 1/300 turns a residual of 1e-9 into an angle of 3e-7 at most.
    assert sine(found.vectors[:, :K], kept) < 1e-6 * float(values[-1])
    eye = torch.eye(K, dtype=torch.float64)
    assert torch.allclose(found.vectors[:, :K].mT @ found.vectors[:, :K], eye, atol=1e-12)


def test_stack_of_unlike_matrices_is_its_parts() -> None:
    """One stack needs different degrees and locks at different times."""
    names = ["flat", "six stand out", "one far out"]
    q = torch.stack([orthogonal(seed) for seed in range(3)])
    values = torch.stack([SPECTRA[n].double() for n in names])
    stack = (q * values.unsqueeze(-2)) @ q.mT
    allowed = 1e-9 * values[:, -1:]
    found = subspace_iteration.filtered(
        stack.matmul,
        subspace_iteration.symmetric_ritz(stack.matmul, K, lambda v: allowed.expand_as(v)),
        start().expand(3, N, WIDTH),
        K,
        lower=values[:, 0],
    )
    assert found.converged
    assert bool((residual_of(stack, found) <= allowed).all())
    for index in range(3):
        top = q[index, :, -K:]
        assert sine(found.vectors[index, :, :K], top) < 1e-6 * float(values[index, -1])


def test_small_values_beside_a_huge_one_in_float32() -> None:
    """Without locking, the rounding of the first value would drown the others."""
    q, p = orthogonal(), orthogonal(2)
    sizes = torch.cat(
        [torch.tensor([1.0, 2e-3, 1e-3]), 1e-4 * torch.linspace(1, 0, N - 3)]
    ).double()
    matrix = ((q * sizes) @ p.mT).float()
    found = subspace_iteration.filtered(
        lambda x: matrix.mT @ (matrix @ x),
        subspace_iteration.gram_ritz(matrix.matmul, matrix.mT.matmul, 3, 2e-6),
        start(torch.float32),
        3,
        lower=torch.zeros(()),
    )
    assert found.converged
    assert found.left is not None
    assert sine(found.vectors[:, :3].double(), p[:, :3]) < 1e-2
    assert sine(found.left[:, :3].double(), q[:, :3]) < 1e-2
    # The same of the huge one alone says that the test could fail.
    assert sine(found.vectors[:, 1:3].double(), p[:, :1]) > 0.9


@pytest.mark.parametrize("error", [0.0, 1e-4, 1.0])
def test_coarse_products_first(error: float) -> None:
    """They do most of the rounds where they lead near; nothing is lost where they lead astray."""
    values, q = SPECTRA["six stand out"].double(), orthogonal()
    matrix = (q * values) @ q.mT
    noise = orthogonal(5)
    counts = {"coarse": 0, "apply": 0}

    def coarse(block: Tensor) -> Tensor:
        counts["coarse"] += 1
        return matrix @ block + error * (noise + noise.mT) @ block

    def apply(block: Tensor) -> Tensor:
        counts["apply"] += 1
        return matrix @ block

    ritz = subspace_iteration.symmetric_ritz(matrix.matmul, K, lambda v: torch.full_like(v, 1e-6))
    found = subspace_iteration.filtered(apply, ritz, start(), K, lower=values[0] - 2, coarse=coarse)
    assert found.converged
    assert float(residual_of(matrix, found).max()) <= 1e-6
    plain = subspace_iteration.filtered(matrix.matmul, ritz, start(), K, lower=values[0] - 2)
    assert sine(found.vectors[:, :K], plain.vectors[:, :K]) < 1e-5
    assert counts["coarse"] > 0
    if error == 0.0:
        assert counts["coarse"] > counts["apply"]
    else:
        # 1e-6 is out of reach for them.
        assert counts["apply"] > 0


def test_what_is_not_a_number_ends_the_iteration() -> None:
    """One member of a stack that is not finite leaves all to a dense solver, at once."""
    matrix = torch.stack([torch.eye(N, dtype=torch.float64)] * 2)
    rounds = 0

    def ritz(block: Tensor) -> subspace_iteration.Ritz:
        nonlocal rounds
        rounds += 1
        found = subspace_iteration.symmetric_ritz(
            matrix.matmul, K, lambda v: torch.full_like(v, 1e-12)
        )(block)
        error = found.error.clone()
        error[1, 2] = float("nan")
        return subspace_iteration.Ritz(found.values, found.vectors, error)

    found = subspace_iteration.filtered(matrix.matmul, ritz, start(), K, lower=torch.zeros(2))
    assert not found.converged
    assert rounds == 1


def test_gives_up_within_its_budget() -> None:
    """Residuals below rounding are out of reach; nothing is returned, and it ends."""
    q = orthogonal()
    values = torch.cat([1 - 1e-9 * torch.arange(N - K).double(), 1 + 1e-9 * torch.arange(K)])
    matrix = (q * values) @ q.mT
    calls = 0

    def apply(block: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix @ block

    exact = subspace_iteration.symmetric_ritz(apply, K, lambda v: torch.full_like(v, 1e-19))
    found = subspace_iteration.filtered(apply, exact, start(), K, lower=values.min())
    assert not found.converged
    assert calls <= subspace_iteration._MAX_PRODUCTS + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthonormal(dtype: torch.dtype) -> None:
    """Also of columns that are nearly, or exactly, the same."""
    block = start(dtype)
    block[:, 3] = block[:, 2] * (1 + 1e-6) + 1e-5 * block[:, 4]
    basis = subspace_iteration.orthonormal(block)
    eye = torch.eye(WIDTH, dtype=dtype)
    assert torch.allclose(basis.mT @ basis, eye, atol=30 * torch.finfo(dtype).eps)
    for k in (1, 2, 5):
        inside = basis[:, :k]
        rest = block[:, :k] - inside @ (inside.mT @ block[:, :k])
        assert float(rest.norm()) < 1e-4 * float(block.norm())
    # Columns of any condition, and a stack of a good one and a bad one.
    for power in (0, 3, 6, 9):
        mixed = orthogonal()[:, :WIDTH] * torch.logspace(0, -power, WIDTH, dtype=torch.float64)
        mixed = (mixed @ orthogonal(3)[:WIDTH, :WIDTH]).to(dtype)
        both = subspace_iteration.orthonormal(torch.stack([mixed, start(dtype)]))
        for one in both:
            assert torch.allclose(one.mT @ one, eye, atol=30 * torch.finfo(dtype).eps), power
    assert bool(torch.isfinite(subspace_iteration.orthonormal(torch.zeros_like(block))).all())
    block[:, 7] = block[:, 6]
    basis = subspace_iteration.orthonormal(block)
    assert bool(torch.isfinite(basis).all())
    assert torch.allclose(basis.mT @ basis, eye, atol=1e-3)
