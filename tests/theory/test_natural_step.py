"""Natural's step is the best step of its rank in the Kronecker metric, against a dense solve.

The quadratic model ``g^T d + d^T H d / 2`` is built with the full ``H = Y (x) X`` of the damped
factors, and solved by dense linear algebra that knows nothing of whitening: the full step by one
solve, the best step of rank r by alternating exact solves in either factor from many starts.
"""

from __future__ import annotations

import pytest
import torch
from benchmarks.studies.theory.algebra import DTYPE, alignment, kron, normal
from benchmarks.studies.theory.linear_model import linear_problem
from benchmarks.studies.theory.lora_da_error import other_subspaces
from torch import Tensor

from lorainit.methods.natural import Natural
from lorainit.types import LayerStatistics

OUT, IN, RANK = 5, 7, 2
SCALING = 0.5


def random_statistics(seed: int, *, white: bool = False) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)

    def second(n: int) -> Tensor:
        if white:
            return 3.0 * torch.eye(n, dtype=DTYPE)
        root = normal(n, n, generator=generator) @ torch.diag(torch.logspace(0, -1, n, dtype=DTYPE))
        return root @ root.T

    x, y = second(IN), second(OUT)
    # Drawn so that the whitened gradient has clear gaps: the best step is then the only one.
    left = torch.linalg.qr(normal(OUT, OUT, generator=generator)).Q
    right = torch.linalg.qr(normal(IN, OUT, generator=generator)).Q
    sizes = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.7, 0.4], dtype=DTYPE))
    gradient = torch.linalg.cholesky(y) @ left @ sizes @ right.T @ torch.linalg.cholesky(x).T
    return LayerStatistics.from_means(
        gradient=gradient, input_second_moment=x, output_second_moment=y
    )


def damped(matrix: Tensor, method: Natural) -> Tensor:
    scale = matrix.diagonal().mean() if method.damping_mode == "relative" else 1.0
    return matrix + method.damping * scale * torch.eye(len(matrix), dtype=DTYPE)


class Dense:
    """The quadratic model over ``vec`` of the step, row after row."""

    def __init__(self, statistics: LayerStatistics, method: Natural) -> None:
        x = damped(statistics.input_second_moment, method)
        y = damped(statistics.output_second_moment, method)
        self.hessian, self.gradient = kron(y, x), statistics.gradient.flatten()

    def value(self, step: Tensor) -> float:
        d = step.flatten()
        return float(self.gradient @ d + 0.5 * d @ self.hessian @ d)

    def full_step(self) -> Tensor:
        return -torch.linalg.solve(self.hessian, self.gradient).reshape(OUT, IN)

    def best_content(self, rows: Tensor) -> Tensor:
        """Exact minimiser over B of ``step = B @ rows``."""
        basis = kron(torch.eye(OUT, dtype=DTYPE), rows.T)
        return self._solve(basis).reshape(OUT, len(rows))

    def best_rows(self, content: Tensor) -> Tensor:
        basis = kron(content, torch.eye(IN, dtype=DTYPE))
        return self._solve(basis).reshape(content.shape[1], IN)

    def _solve(self, basis: Tensor) -> Tensor:
        return -torch.linalg.solve(basis.T @ self.hessian @ basis, basis.T @ self.gradient)

    def best_step(self, rank: int, starts: int = 5, rounds: int = 60) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(starts):
            rows = normal(rank, IN, generator=generator)
            for _ in range(rounds):
                rows = torch.linalg.qr(rows.T).Q.T
                rows = self.best_rows(torch.linalg.qr(self.best_content(rows)).Q)
            rows = torch.linalg.qr(rows.T).Q.T
            found.append(self.best_content(rows) @ rows)
        return min(found, key=self.value)


def truncated(step: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def natural_step(method: Natural, statistics: LayerStatistics, rank: int) -> Tensor:
    weight = torch.zeros(OUT, IN, dtype=DTYPE)
    factors = method.solve(weight, statistics, rank, SCALING)
    return SCALING * factors.B @ factors.A


METHODS = [
    Natural(damping=0.01),
    Natural(damping=1e-6, damping_mode="absolute", length=1.0, activation=2.0),
    Natural(damping=0.3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.damping_mode}-{m.damping}")
@pytest.mark.parametrize("seed", range(3))
def test_full_rank_step_is_the_dense_solve(method: Natural, seed: int) -> None:
    statistics = random_statistics(seed)
    step = natural_step(method, statistics, OUT)
    torch.testing.assert_close(step, Dense(statistics, method).full_step(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.damping_mode}-{m.damping}")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_step_is_the_best_of_its_rank(method: Natural, rank: int, seed: int) -> None:
    statistics = random_statistics(seed)
    dense, step = Dense(statistics, method), natural_step(method, statistics, rank)
    assert torch.linalg.matrix_rank(step) == rank
    best = dense.best_step(rank)
    assert dense.value(step) == pytest.approx(dense.value(best), abs=1e-8)
    torch.testing.assert_close(step, best, rtol=1e-8, atol=1e-8)
    # And the promised decrease is half the squares of the singular values kept.
    kept = method.singular_values(statistics, rank)
    assert dense.value(step) == pytest.approx(-0.5 * float(kept.square().sum()), abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_every_other_cut_is_strictly_worse(seed: int) -> None:
    statistics, method = random_statistics(seed), METHODS[0]
    dense = Dense(statistics, method)
    value = dense.value(natural_step(method, statistics, RANK))
    assert value < 0
    euclidean = truncated(dense.full_step(), RANK)
    assert dense.value(euclidean) > 0.95 * value
    # Not for want of length: nor at the best length along it, nor with the best B for its rows.
    rows = torch.linalg.svd(euclidean)[2][:RANK]
    assert dense.value(dense.best_content(rows) @ rows) > 0.98 * value
    one_sided = LayerStatistics.from_means(
        gradient=statistics.gradient,
        input_second_moment=statistics.input_second_moment,
        output_second_moment=torch.eye(OUT, dtype=DTYPE),
    )
    rows = torch.linalg.svd(natural_step(method, one_sided, RANK))[2][:RANK]
    assert dense.value(dense.best_content(rows) @ rows) > 0.98 * value
    gradient_rows = torch.linalg.svd(statistics.gradient)[2][:RANK]
    assert dense.value(dense.best_content(gradient_rows) @ gradient_rows) > 0.98 * value


def test_in_a_white_metric_the_euclidean_cut_is_the_same() -> None:
    statistics, method = random_statistics(4, white=True), METHODS[0]
    step = natural_step(method, statistics, RANK)
    full = Dense(statistics, method).full_step()
    torch.testing.assert_close(step, truncated(full, RANK), rtol=1e-8, atol=1e-10)


def test_an_undamped_reference_is_told_apart() -> None:
    statistics = random_statistics(0)
    step = natural_step(METHODS[2], statistics, OUT)
    plain = Dense(statistics, Natural(damping=0.0)).full_step()
    assert (step - plain).norm() > 0.1 * plain.norm()


def test_rows_are_the_subspace_of_the_linear_model_s_theory() -> None:
    """`other_subspaces` has Natural's input side by formula; the class must give the same."""
    problem = linear_problem()
    method = Natural(damping=0.0, damping_mode="absolute")
    factors = method.solve(problem.base, problem.statistics(), 3, 1.0)
    rows = torch.linalg.qr(factors.A.mT).Q
    assert alignment(rows, other_subspaces(problem, 3)["natural"]) == pytest.approx(1, abs=1e-9)


def test_a_float32_gradient_is_whitened_in_float32_and_exactly_enough() -> None:
    """At the default damping, where second moments are nearly singular: few sequences' inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = normal(8, 96, generator=generator), normal(8, 64, generator=generator)
    gradient = outputs.T @ inputs
    statistics = LayerStatistics.from_means(
        gradient=gradient,
        input_second_moment=inputs.T @ inputs,
        output_second_moment=outputs.T @ outputs,
    )
    metric = Natural().metric(statistics)
    exact, quick = (metric.whiten_gradient(g) for g in (gradient, gradient.float()))
    assert (exact.dtype, quick.dtype) == (torch.float64, torch.float32)
    assert 0 < torch.dist(quick.double(), exact) < 1e-4 * exact.norm()
