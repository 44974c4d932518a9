"""LoRA-DA's Omega is the expected squared error of the projected full estimate, term by term.

On ``y = W x + n`` with Gaussian ``x`` and ``n ~ N(0, C)`` the full fine-tuned estimate is least
squares, with ``E |change - P estimate|^2 = |(I - P) change|^2 + tr(P Z^-1) tr(C) / N`` as N grows,
and with ``N - in - 1`` instead of ``N`` at any N. The Fisher factors are ``Z`` and ``Y = C^-1``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.studies.theory.algebra import alignment, orthonormal, spearman, z_score
from benchmarks.studies.theory.linear_model import LinearProblem, linear_problem
from benchmarks.studies.theory.lora_da_error import (
    effective_samples,
    exact_lora_da,
    inside_terms,
    lora_da_subspace,
    other_subspaces,
    projection_terms,
    simulate,
)

from lorainit import linalg
from lorainit.methods.lora_da import LoraDA
from lorainit.types import LayerStatistics

RANK = 3
SAMPLES = (40, 160, 640, 2560, 10240)
PROBLEM = linear_problem()
OUT, IN = PROBLEM.shape


def subspaces(samples: int) -> dict[str, torch.Tensor]:
    method = exact_lora_da(effective_samples(samples, IN))
    return {
        "lora_da": lora_da_subspace(PROBLEM, method, RANK),
        **other_subspaces(PROBLEM, RANK),
    }


def expected(subspace: torch.Tensor, samples: float) -> float:
    bias, variance = projection_terms(PROBLEM, subspace)
    return bias + variance / samples


@pytest.fixture(scope="module")
def simulated() -> dict[int, dict[str, dict[str, torch.Tensor]]]:
    repeats = {samples: max(200, min(3000, 1_000_000 // samples)) for samples in SAMPLES}
    return {n: simulate(PROBLEM, subspaces(n), n, repeats[n], seed=n, inside=True) for n in SAMPLES}


@pytest.fixture
def solved_omega(monkeypatch) -> Callable[[LoraDA, LinearProblem], torch.Tensor]:
    """The matrix whose smallest eigenvectors `LoraDA.solve` takes, ``sigma^2 Omega``."""
    seen: list[torch.Tensor] = []
    original = linalg.eigh

    def record(matrix: torch.Tensor) -> object:
        seen.append(matrix)
        return original(matrix)

    def omega(method: LoraDA, problem: LinearProblem) -> torch.Tensor:
        monkeypatch.setattr(linalg, "eigh", record)
        method.solve(problem.base, problem.statistics(), RANK, 1.0)
        monkeypatch.undo()
        return seen[-1]

    return omega


@pytest.mark.parametrize("samples", [40, 2560])
def test_omega_is_the_objective_up_to_its_scale_and_a_constant(solved_omega, samples) -> None:
    n = effective_samples(samples, IN)
    omega = solved_omega(exact_lora_da(n), PROBLEM)
    half = solved_omega(exact_lora_da(n, beta=0.5), PROBLEM)
    constant = float(PROBLEM.change.square().sum())
    for subspace in subspaces(samples).values():
        value = constant + float(torch.trace(subspace.T @ omega @ subspace))
        assert value == pytest.approx(expected(subspace, n), rel=1e-10)
    # A random subspace, where the variance is never negligible.
    subspace = subspaces(samples)["random"]
    wrong = constant + float(torch.trace(subspace.T @ half @ subspace))
    assert wrong != pytest.approx(expected(subspace, n), rel=1e-2)


def test_solve_starts_at_the_projected_change_in_its_own_scale() -> None:
    method = exact_lora_da(500)
    factors = method.solve(PROBLEM.base, PROBLEM.statistics(), RANK, 1.0)
    subspace = factors.A.mT * method.gamma**0.5
    norm = torch.linalg.matrix_norm(PROBLEM.change, 2)
    start = factors.B @ factors.A * method.gamma * norm
    torch.testing.assert_close(start, PROBLEM.change @ subspace @ subspace.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize("samples", SAMPLES)
def test_simulated_error_is_the_formula(simulated, samples: int) -> None:
    n = effective_samples(samples, IN)
    for name, subspace in subspaces(samples).items():
        z = z_score(simulated[samples][name]["projected"], expected(subspace, n))
        assert abs(z) < 4, (name, z)


def test_a_wrong_reading_of_the_fisher_factors_is_rejected(simulated) -> None:
    subspace, errors = subspaces(160)["lora_da"], simulated[160]["lora_da"]["projected"]
    bias, variance = projection_terms(PROBLEM, subspace)
    n = effective_samples(160, IN)
    z, c = PROBLEM.input_covariance, PROBLEM.noise_covariance
    inverted = torch.trace(subspace.T @ z @ subspace) * torch.trace(c)
    precision = variance / torch.trace(c) * torch.trace(torch.linalg.inv(c))
    for wrong in (inverted, precision, 0.03 * variance, 0.0):
        assert abs(z_score(errors, bias + float(wrong) / n)) > 8
    # The asymptotic N in place of N - in - 1 is told apart too, at this N.
    assert abs(z_score(errors, bias + variance / 160)) > 4


@pytest.mark.parametrize("samples", SAMPLES)
def test_lora_da_has_the_least_error_of_all(simulated, samples: int) -> None:
    errors = simulated[samples]
    least = errors["lora_da"]["projected"]
    assert len(errors) >= 6
    for name, other in errors.items():
        if name != "lora_da":
            assert z_score(other["projected"] - least) > 8, name
    generator = torch.Generator().manual_seed(5)
    n = effective_samples(samples, IN)
    best = expected(subspaces(samples)["lora_da"], n)
    assert all(expected(orthonormal(IN, RANK, generator), n) > best for _ in range(200))


def test_the_wrong_weight_of_the_variance_costs(simulated) -> None:
    ignoring = {"beta_0": lora_da_subspace(PROBLEM, exact_lora_da(27, beta=0.0), RANK)}
    errors = simulate(PROBLEM, ignoring, 40, 3000, seed=40)["beta_0"]["projected"]
    assert z_score(errors - simulated[40]["lora_da"]["projected"][: len(errors)]) > 8
    heavy = exact_lora_da(effective_samples(10240, IN), beta=1e4)
    dear = {"beta_1e4": lora_da_subspace(PROBLEM, heavy, RANK)}
    errors = simulate(PROBLEM, dear, 10240, 200, seed=10240)["beta_1e4"]["projected"]
    assert z_score(errors - simulated[10240]["lora_da"]["projected"]) > 8


def test_variance_rules_small_samples_and_bias_large_ones() -> None:
    inputs = other_subspaces(PROBLEM, RANK)["eva"]
    change = torch.linalg.svd(PROBLEM.change)[2][:RANK].T
    rows = []
    for samples in (4, 40, 160, 640, 2560, 10240, 1_000_000):
        subspace = lora_da_subspace(PROBLEM, exact_lora_da(samples), RANK)
        bias, variance = projection_terms(PROBLEM, subspace)
        rows.append((bias, variance, alignment(subspace, inputs), alignment(subspace, change)))
    biases, variances, to_inputs, to_change = zip(*rows, strict=True)
    # As N grows, the best trade accepts more noise per sample for less bias, never the reverse.
    assert list(biases) == sorted(biases, reverse=True)
    assert list(variances) == sorted(variances)
    assert to_inputs[0] > 0.99
    assert to_inputs[-1] < 0.2
    assert to_change[0] < 0.2
    assert to_change[-1] > 0.9999
    # What the choice minimises: the change caught against the noise let in.
    total = float(PROBLEM.change.square().sum())
    caught_over_noise = [
        (total - b) / (v / n)
        for b, v, n in zip(biases, variances, (4, 40, 160, 640, 2560, 10240, 1e6), strict=True)
    ]
    assert caught_over_noise[0] < 0.2
    assert caught_over_noise[-1] > 1e3


def test_beta_in_the_units_of_sequences() -> None:
    """With T label tokens among P counted positions, ``beta`` is P, or P / T^2 in token units.

    K-FAC's information of a sequence is ``P Sx (x) Sy``; unlabelled positions have ``g = 0`` here.
    """
    positions, labels, sequences = 11, 7, 50
    gradient, second = PROBLEM.gradient(), PROBLEM.input_covariance
    output = torch.linalg.inv(PROBLEM.noise_covariance) * labels / positions

    def statistics(scale: float) -> LayerStatistics:
        return LayerStatistics.from_means(
            gradient=gradient, input_second_moment=second, output_second_moment=output * scale
        )

    by_token, by_sequence = statistics(1.0), statistics(labels**-2)
    truth = lora_da_subspace(PROBLEM, exact_lora_da(sequences * labels), RANK)
    for units, beta in ((by_token, positions / labels**2), (by_sequence, float(positions))):
        found = lora_da_subspace(PROBLEM, exact_lora_da(sequences, beta=beta), RANK, units)
        assert alignment(found, truth) == pytest.approx(1, abs=1e-10)
    uncorrected = lora_da_subspace(PROBLEM, exact_lora_da(sequences), RANK, by_sequence)
    assert alignment(uncorrected, truth) < 0.95


def test_correlated_noise_breaks_the_diagonal_output_fisher() -> None:
    """The limit of ``diag(Sy)``: with correlated outputs the variance comes out too small."""
    problem = linear_problem(correlated=True)
    trace = float(torch.trace(problem.noise_covariance))
    seen = float((1 / problem.statistics().output_second_moment_diagonal).sum())
    assert seen < 0.8 * trace
    subspace = lora_da_subspace(problem, exact_lora_da(100), RANK)
    errors = simulate(problem, {"lora_da": subspace}, 113, 1000, seed=2)["lora_da"]["projected"]
    bias, variance = projection_terms(problem, subspace)
    assert abs(z_score(errors, bias + variance / 100)) < 4
    assert abs(z_score(errors, bias + variance / 100 * seen / trace)) > 8
    # And the start is not the Newton step, projected.
    factors = exact_lora_da(100).solve(problem.base, problem.statistics(), RANK, 1.0)
    start, newton = factors.B @ factors.A, problem.change @ subspace @ subspace.T
    cosine = (start * newton).sum() / (start.norm() * newton.norm())
    assert cosine < 0.999


# --- the finding: training inside the subspace is another problem -----------------------------


@pytest.mark.parametrize("samples", SAMPLES)
def test_training_inside_the_subspace_has_its_own_formula(simulated, samples: int) -> None:
    freedom = samples - RANK - 1
    for name, subspace in subspaces(samples).items():
        for kind, (bias, variance) in inside_terms(PROBLEM, subspace).items():
            z = z_score(simulated[samples][name][kind], bias + variance / freedom)
            assert abs(z) < 4, (name, kind, z)


def test_training_inside_has_more_bias_and_less_noise_per_unit_of_noise() -> None:
    for name, subspace in subspaces(640).items():
        bias, _ = projection_terms(PROBLEM, subspace)
        inner = torch.linalg.inv(subspace.T @ PROBLEM.input_covariance @ subspace)
        outer = subspace.T @ torch.linalg.solve(PROBLEM.input_covariance, subspace)
        inside = inside_terms(PROBLEM, subspace)["weight"][0]
        assert torch.linalg.eigvalsh(outer - inner).min() > -1e-10
        if name == "eva":  # eigenvectors of the inputs: the only place where the two agree
            assert inside == pytest.approx(bias, rel=1e-10)
            torch.testing.assert_close(inner, outer)
        else:
            assert inside > 1.001 * bias
            assert torch.trace(outer) > 1.001 * torch.trace(inner)


def test_the_rankings_need_not_agree(simulated) -> None:
    """The full estimate's error picks LoRA-DA; trained inside, another subspace can win."""
    errors = simulated[160]
    assert z_score(errors["natural"]["projected"] - errors["lora_da"]["projected"]) > 8
    assert z_score(errors["natural"]["weight"] - errors["lora_da"]["weight"]) < -8


@pytest.mark.parametrize("samples", SAMPLES)
def test_naturals_subspace_has_the_least_risk_after_training_inside(simulated, samples) -> None:
    """The noise is ``rank (out / 2 + bias) / (N - rank - 1)``: least bias is best at any N."""
    least = simulated[samples]["natural"]["risk"]
    for name, errors in simulated[samples].items():
        if name != "natural":
            assert z_score(errors["risk"] - least) > 8, name
    bias, variance = inside_terms(PROBLEM, subspaces(samples)["natural"])["risk"]
    assert variance == pytest.approx(RANK * (OUT / 2 + bias), rel=1e-10)
    generator = torch.Generator().manual_seed(6)
    others = [orthonormal(IN, RANK, generator) for _ in range(200)]
    assert all(inside_terms(PROBLEM, other)["risk"][0] > bias for other in others)


def test_spearman_and_z_score_themselves() -> None:
    assert spearman(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([2.0, 9.0, 4.0])) == 1.0
    assert spearman(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([-2.0, -9.0, -4.0])) == -1.0
    assert z_score(torch.tensor([1.0, 3.0]), 0.0) == pytest.approx(2.0)


def test_the_papers_beta_is_not_the_objective() -> None:
    """With 0.03 the variance counts as if there were 33 times the samples."""
    paper = lora_da_subspace(PROBLEM, exact_lora_da(30, beta=LoraDA.paper().beta), RANK)
    scaled = lora_da_subspace(PROBLEM, exact_lora_da(1000), RANK)
    assert alignment(paper, scaled) == pytest.approx(1, abs=1e-9)
    own = lora_da_subspace(PROBLEM, exact_lora_da(30), RANK)
    assert expected(paper, 30) > 1.5 * expected(own, 30)
