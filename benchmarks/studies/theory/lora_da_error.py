"""LoRA-DA's objective on the linear model: formula and simulation of the estimate's error."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.studies.theory.algebra import inverse_root, orthonormal
from benchmarks.studies.theory.linear_model import LinearProblem
from lorainit.methods import LoraDA
from lorainit.types import LayerStatistics


def exact_lora_da(samples: float, *, beta: float = 1.0) -> LoraDA:
    """The settings that make ``Omega`` the objective itself: no damping, both weights one."""
    return LoraDA(
        beta=beta, bias_weight=1.0, damping=0.0, damping_mode="absolute", population=samples
    )


def effective_samples(samples: int, inputs: int) -> int:
    """``E (X^T X)^-1 = Z^-1 / (N - in - 1)`` for Gaussian inputs; the asymptotic theory has N."""
    return samples - inputs - 1


def lora_da_subspace(
    problem: LinearProblem, method: LoraDA, rank: int, statistics: LayerStatistics | None = None
) -> Tensor:
    """``(in, rank)``, orthonormal: the input subspace of `LoraDA.solve`."""
    used = problem.statistics() if statistics is None else statistics
    factors = method.solve(problem.base, used, rank, 1.0)
    return factors.A.mT * method.gamma**0.5


def other_subspaces(problem: LinearProblem, rank: int, seed: int = 1) -> dict[str, Tensor]:
    """Input subspaces of the other methods, ``(in, rank)``, orthonormal, by their formulas."""
    rows = torch.linalg.svd(problem.base, full_matrices=False).Vh
    gradient = problem.gradient()
    _, inputs = problem.shape
    inverse = inverse_root(problem.input_covariance)
    # C^1/2 and not C^-1/2: the output Fisher is C^-1, and Natural whitens by its inverse root.
    whitened = torch.linalg.inv(inverse_root(problem.noise_covariance)) @ gradient @ inverse
    natural = inverse @ torch.linalg.svd(whitened, full_matrices=False).Vh[:rank].T
    return {
        "pissa": rows[:rank].T,
        "milora": rows[-rank:].T,
        "gradient_svd": torch.linalg.svd(gradient, full_matrices=False).Vh[:rank].T,
        "eva": torch.linalg.eigh(problem.input_covariance)[1][:, -rank:],
        "random": orthonormal(inputs, rank, torch.Generator().manual_seed(seed)),
        "natural": torch.linalg.qr(natural).Q,
    }


def projection_terms(problem: LinearProblem, subspace: Tensor) -> tuple[float, float]:
    """Bias ``|change (I - P)|^2`` and variance times samples, ``tr(A0^T Z^-1 A0) tr(C)``."""
    missed = problem.change - problem.change @ subspace @ subspace.T
    noise = torch.linalg.solve(problem.input_covariance, subspace)
    variance = (subspace * noise).sum() * torch.trace(problem.noise_covariance)
    return float(missed.square().sum()), float(variance)


def inside_terms(problem: LinearProblem, subspace: Tensor) -> dict[str, tuple[float, float]]:
    """The same for training B inside a fixed subspace: bias, and variance times (N - rank - 1).

    The residual of the inputs outside the subspace acts as further noise, exactly so for Gaussian
    inputs. ``"weight"``: squared distance to the target weight. ``"risk"``: excess expected loss.
    """
    z, c, change = problem.input_covariance, problem.noise_covariance, problem.change
    inner = subspace.T @ z @ subspace
    regression = torch.linalg.solve(inner, subspace.T @ z)
    missed = change - change @ regression.T @ subspace.T
    extra = change @ (z - z @ subspace @ regression) @ change.T
    rank, precision = subspace.shape[1], torch.linalg.inv(c)
    spread = torch.trace(torch.linalg.inv(inner)) * torch.trace(c + extra)
    risk = 0.5 * torch.trace(precision @ extra)
    return {
        "weight": (float(missed.square().sum()), float(spread)),
        "risk": (float(risk), float(0.5 * rank * torch.trace(precision @ (c + extra)))),
    }


def simulate(
    problem: LinearProblem,
    subspaces: dict[str, Tensor],
    samples: int,
    repeats: int,
    seed: int,
    *,
    inside: bool = False,
) -> dict[str, dict[str, Tensor]]:
    """Errors of least squares on `repeats` drawn data sets, the same ones for every subspace.

    ``"projected"``: squared distance to the change of the full estimate, projected. With `inside`,
    also ``"weight"`` and ``"risk"`` of least squares restricted to the subspace. Each is
    ``(repeats,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, dict[str, list[Tensor]]] = {name: {} for name in subspaces}
    precision = torch.linalg.inv(problem.noise_covariance)
    chunk = max(1, 200_000 // samples)
    for start in range(0, repeats, chunk):
        x, y = problem.sample(min(chunk, repeats - start), samples, generator)
        gram, cross = x.mT @ x, x.mT @ (y - x @ problem.base.T)
        estimate = torch.linalg.solve(gram, cross).mT
        for name, a in subspaces.items():
            found = {"projected": problem.change - estimate @ a @ a.T}
            if inside:
                trained = torch.linalg.solve(a.T @ gram @ a, a.T @ cross)
                found["weight"] = problem.change - (a @ trained).mT
            for kind, error in found.items():
                errors[name].setdefault(kind, []).append(error.square().sum((-2, -1)))
            if inside:
                error = found["weight"]
                risk = (precision @ error * (error @ problem.input_covariance)).sum((-2, -1))
                errors[name].setdefault("risk", []).append(0.5 * risk)
    return {
        name: {kind: torch.cat(parts) for kind, parts in kinds.items()}
        for name, kinds in errors.items()
    }
