"""L-BFGS and principal directions, against closed forms."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit.linalg.lbfgs import minimize
from lorainit.linalg.principal import centred_basis


def quadratic(seed: int = 0, size: int = 30, condition: float = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, float(torch.tensor(condition).log10()), size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.mT, torch.randn(size, generator=generator).double()


def test_it_finds_the_minimum_of_a_quadratic() -> None:
    matrix, linear = quadratic()

    def objective(x: Tensor) -> tuple[float, Tensor]:
        return float(x @ matrix @ x / 2 - linear @ x), matrix @ x - linear

    start = torch.zeros(30, dtype=torch.float64)
    found = minimize(objective, start, tolerance=1e-9, max_evaluations=1000)
    exact = torch.linalg.solve(matrix, linear)
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-7)
    early = minimize(objective, start, tolerance=1e-9, max_evaluations=3)
    assert not torch.allclose(early, exact, rtol=1e-2)


def test_values_that_are_not_finite_are_stepped_back_from() -> None:
    def objective(x: Tensor) -> tuple[float, Tensor]:
        value = (x - 1).square().sum() if float(x.abs().max()) < 2 else torch.tensor(torch.nan)
        return float(50 * value), 100 * (x - 1)

    found = minimize(objective, torch.full((2,), -1.5, dtype=torch.float64), tolerance=1e-8)
    assert torch.allclose(found, torch.ones(2, dtype=torch.float64), atol=1e-8)


def test_every_branch_hangs_on_given_values_alone() -> None:
    """Two that are told the same values and gradients ask for the same number of points."""
    matrix, linear = quadratic(1)
    told: list[tuple[float, Tensor]] = []

    def first(x: Tensor) -> tuple[float, Tensor]:
        told.append((float(x @ matrix @ x / 2 - linear @ x), matrix @ x - linear))
        return told[-1]

    start = torch.zeros(30, dtype=torch.float64)
    minimize(first, start, tolerance=1e-6)
    left = iter(told)
    # Another rounding of the points.
    minimize(lambda x: next(left), start + 1e-13, tolerance=1e-6)
    assert next(left, None) is None


def test_directions_span_the_centred_features() -> None:
    generator = torch.Generator().manual_seed(2)
    for count, width in ((5, 12), (40, 12)):
        x = torch.randn(count, width, generator=generator, dtype=torch.float64) + 3
        mean, directions, variances = centred_basis(x, centre=True)
        assert torch.allclose(mean, x.mean(0))
        assert len(directions) == min(count - 1, width)
        eye = torch.eye(len(directions), dtype=torch.float64)
        assert torch.allclose(directions @ directions.mT, eye, atol=1e-10)
        centred = x - mean
        covariance = directions.mT @ torch.diag(variances) @ directions
        assert torch.allclose(covariance, centred.mT @ centred / count, atol=1e-10)
        assert not centred_basis(x, centre=False)[0].any()
