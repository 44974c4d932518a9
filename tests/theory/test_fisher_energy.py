"""FILet's energy is the second-order change of the KL divergence along a candidate.

``d^2/dt^2 KL(p_W || p_{W + t u v^T}) = E (v^T x)^2 (u^T F(x) u)`` with ``F(x) = E[g g^T | x]`` for
labels drawn from the model. It is ``(v^T Sx v)(u^T Sy u)`` exactly where ``F`` does not depend on
``x``; the expectation over labels is taken exactly, so equality holds to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from benchmarks.studies.theory.algebra import DTYPE, normal, spearman
from benchmarks.studies.theory.kl_curvature import (
    categorical_kl,
    curvature,
    gram_candidates,
    svd_candidates,
    transformer_correlations,
)
from benchmarks.studies.theory.tiny_llama import tiny_llama
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from lorainit.methods.filet import FILet, fisher_energy
from lorainit.types import LayerStatistics

IN, OUT, SAMPLES = 12, 8, 96


@dataclass
class Case:
    weight: Tensor
    inputs: Tensor
    divergence: Callable[[Tensor], Tensor]
    gradients: Callable[[], tuple[Tensor, Tensor]]
    """Output gradients ``(labels, samples, out)`` and their probabilities ``(labels, samples)``."""

    def statistics(self) -> LayerStatistics:
        g, chances = self.gradients()
        second = torch.einsum("ls,lso,lsp->op", chances, g, g) / self.inputs.shape[0]
        return LayerStatistics.from_means(
            input_second_moment=self.inputs.T @ self.inputs / self.inputs.shape[0],
            output_second_moment=second,
        )

    def energy(self, u: Tensor, v: Tensor) -> Tensor:
        statistics = self.statistics()
        return fisher_energy(u, v, statistics.input_second_moment, statistics.output_second_moment)


def draw(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """A weight of decaying spectrum and correlated, uncentred, non-Gaussian inputs."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.diag(torch.logspace(0, -1, OUT, dtype=DTYPE))
    weight = decay @ normal(OUT, IN, generator=generator) / IN**0.5
    mixing = normal(IN, IN, generator=generator) @ torch.diag(
        torch.logspace(0, -1.5, IN, dtype=DTYPE)
    )
    inputs = (normal(SAMPLES, IN, generator=generator).exp() - 1) @ mixing.T
    return weight, inputs, generator


def gaussian(seed: int = 0) -> Case:
    """The layer in the middle of a linear network with correlated Gaussian noise on its outputs."""
    weight, inputs, generator = draw(seed)
    after = normal(5, OUT, generator=generator)
    root = normal(5, 5, generator=generator)
    covariance = root @ root.T + 0.1 * torch.eye(5, dtype=DTYPE)
    factor = torch.linalg.cholesky(covariance)

    def divergence(change: Tensor) -> Tensor:
        base = MultivariateNormal(inputs @ (after @ weight).T, covariance)
        changed = MultivariateNormal(inputs @ (after @ (weight + change)).T, covariance)
        return kl_divergence(base, changed).mean()

    def gradients() -> tuple[Tensor, Tensor]:
        # Labels at mean +- sqrt(5) times the noise's axes have its covariance exactly.
        axes = torch.cat([factor.T, -factor.T]) * 5**0.5
        y = (inputs @ weight.T).requires_grad_()
        mean = y @ after.T
        found = []
        for axis in axes:
            likelihood = MultivariateNormal(mean, covariance).log_prob(mean.detach() + axis)
            found.append(torch.autograd.grad(-likelihood.sum(), y, retain_graph=True)[0])
        return torch.stack(found), torch.full((10, SAMPLES), 0.1, dtype=DTYPE)

    return Case(weight, inputs, divergence, gradients)


def softmax(seed: int = 0, *, constant: bool, labels: Tensor | None = None) -> Case:
    """A classifier over the layer; `constant`: a skip path leaves its logits the same for all x."""
    weight, inputs, generator = draw(seed)
    head = 2 * normal(7, OUT, generator=generator)
    offset = normal(7, generator=generator) - (
        inputs @ (head @ weight).T if constant else torch.zeros(1, dtype=DTYPE)
    )

    def logits(y: Tensor) -> Tensor:
        return y @ head.T + offset

    def divergence(change: Tensor) -> Tensor:
        base = logits(inputs @ weight.T)
        return categorical_kl(base, logits(inputs @ (weight + change).T)).mean()

    def gradients() -> tuple[Tensor, Tensor]:
        y = (inputs @ weight.T).requires_grad_()
        log_chances = logits(y).log_softmax(-1)
        rows = [
            torch.autograd.grad(-log_chances[:, label].sum(), y, retain_graph=True)[0]
            for label in range(7)
        ]
        chances = log_chances.detach().exp().T if labels is None else labels
        return torch.stack(rows), chances

    return Case(weight, inputs, divergence, gradients)


EXACT = {"gaussian": gaussian, "softmax": lambda seed=0: softmax(seed, constant=True)}


@pytest.mark.parametrize("candidates", [gram_candidates, svd_candidates])
@pytest.mark.parametrize("name", EXACT)
def test_energy_is_the_curvature_where_the_kronecker_form_is_exact(name, candidates) -> None:
    case = EXACT[name]()
    u, v = candidates(case.weight)
    measured, energy = curvature(case.divergence, u, v), case.energy(u, v)
    torch.testing.assert_close(energy, measured, rtol=1e-8, atol=0)
    assert spearman(energy, measured) > 0.9


@pytest.mark.parametrize("name", EXACT)
def test_labels_drawn_rather_than_summed_keep_the_ranking(name) -> None:
    case = EXACT[name]()
    u, v = gram_candidates(case.weight)
    g, chances = case.gradients()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(chances.T, 4, replacement=True, generator=generator)
    counts = torch.zeros_like(chances.T).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=DTYPE))
    sampled = Case(case.weight, case.inputs, case.divergence, lambda: (g, counts.T / 4))
    measured = curvature(case.divergence, u, v)
    assert spearman(sampled.energy(u, v), measured) > 0.9


@pytest.mark.parametrize("select", ["lowest", "highest"])
@pytest.mark.parametrize("candidates", ["gram", "svd"])
def test_filet_keeps_the_candidates_of_extreme_curvature(select, candidates) -> None:
    case, rank = gaussian(), 3
    u, v = (gram_candidates if candidates == "gram" else svd_candidates)(case.weight)
    measured = curvature(case.divergence, u, v)
    kept = measured.argsort(descending=select == "highest")[:rank]
    factors = FILet(candidates=candidates, select=select).solve(
        case.weight, case.statistics(), rank, 2.0
    )
    cosines = torch.nn.functional.normalize(factors.A, dim=-1) @ v[:, kept]
    torch.testing.assert_close(
        cosines.diagonal().abs(), torch.ones(rank, dtype=DTYPE), rtol=0, atol=1e-8
    )
    outputs = torch.nn.functional.normalize(factors.B, dim=0).T @ u[:, kept]
    torch.testing.assert_close(
        outputs.diagonal().abs(), torch.ones(rank, dtype=DTYPE), rtol=0, atol=1e-8
    )


def spread(energy: Tensor, measured: Tensor) -> float:
    ratio = energy / measured
    return float(ratio.max() / ratio.min() - 1)


def test_a_fisher_that_depends_on_the_input_is_told_apart() -> None:
    case = softmax(constant=False)
    u, v = gram_candidates(case.weight)
    assert spread(case.energy(u, v), curvature(case.divergence, u, v)) > 0.1


def test_labels_of_the_data_instead_of_the_models_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    other = torch.rand(7, SAMPLES, generator=generator, dtype=DTYPE) ** 4
    case = softmax(constant=True, labels=other / other.sum(0))
    u, v = gram_candidates(case.weight)
    assert spread(case.energy(u, v), curvature(case.divergence, u, v)) > 0.1


def test_no_single_factor_is_enough() -> None:
    case = gaussian()
    u, v = gram_candidates(case.weight)
    statistics, measured = case.statistics(), curvature(case.divergence, u, v)
    one_in, one_out = torch.eye(IN, dtype=DTYPE), torch.eye(OUT, dtype=DTYPE)
    assert spread(fisher_energy(u, v, statistics.input_second_moment, one_out), measured) > 0.1
    assert spread(fisher_energy(u, v, one_in, statistics.output_second_moment), measured) > 0.1


def test_a_trained_transformer_keeps_most_of_the_ranking() -> None:
    """Here 0.96 (svd) and 0.76 (gram) on average; the bounds leave room for other kernels."""
    model, tokens, loss = tiny_llama(steps=150)
    assert loss < 2.4  # nats; a uniform guess has 2.77
    for candidates, mean in ((svd_candidates, 0.9), (gram_candidates, 0.55)):
        found = transformer_correlations(model, tokens[:16], candidates, draws=16)
        assert len(found) == 14
        energy = torch.tensor([row["energy"] for row in found.values()])
        assert energy.mean() > mean
        assert energy.median() > mean
        for score in ("input_part_alone", "output_part_alone", "weight_gain_alone"):
            alone = sum(row[score] for row in found.values()) / len(found)
            assert energy.mean() > alone + 0.05
