"""A linear model whose fine-tuned estimate is ordinary least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.studies.theory.algebra import DTYPE, normal, orthonormal
from lorainit.types import LayerStatistics


@dataclass(frozen=True, eq=False)
class LinearProblem:
    """``y = W x + n``, ``x ~ N(0, Z)``, ``n ~ N(0, C)``; ``W = base + change`` is the target.

    The loss is the negative log-likelihood, so the Fisher information of one sample is
    ``Z (x) C^-1``: LoRA-DA's ``Z`` is the inputs' second moment and its ``Y`` is ``C^-1``.
    """

    base: Tensor
    change: Tensor
    input_covariance: Tensor
    noise_covariance: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape[0], self.base.shape[1]

    def gradient(self) -> Tensor:
        """Gradient of the expected loss at the base weight, by autograd."""
        weight = self.base.clone().requires_grad_()
        error = weight - self.base - self.change
        precision = torch.linalg.inv(self.noise_covariance)
        loss = 0.5 * torch.trace(precision @ error @ self.input_covariance @ error.T)
        return torch.autograd.grad(loss, weight)[0]

    def statistics(self) -> LayerStatistics:
        """Exact: the true Fisher factors and the expected gradient at the base weight."""
        return LayerStatistics.from_means(
            gradient=self.gradient(),
            input_second_moment=self.input_covariance,
            output_second_moment=torch.linalg.inv(self.noise_covariance),
        )

    def empirical_statistics(
        self, samples: int | None, generator: torch.Generator | None = None
    ) -> LayerStatistics:
        """What a collector sees at the base weight with the data's own labels; None: its limit."""
        precision = torch.linalg.inv(self.noise_covariance)
        if samples is None:
            residual = self.noise_covariance + self.change @ self.input_covariance @ self.change.T
            return LayerStatistics.from_means(
                gradient=self.gradient(),
                input_second_moment=self.input_covariance,
                output_second_moment=precision @ residual @ precision,
            )
        assert generator is not None
        x, y = self.sample(1, samples, generator)
        g = -(y[0] - x[0] @ self.base.T) @ precision
        return LayerStatistics.from_means(
            gradient=g.T @ x[0] / samples,
            input_second_moment=x[0].T @ x[0] / samples,
            output_second_moment=g.T @ g / samples,
        )

    def sample(
        self, repeats: int, samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        out, inputs = self.shape
        x = normal(repeats, samples, inputs, generator=generator)
        x = x @ torch.linalg.cholesky(self.input_covariance).T
        noise = normal(repeats, samples, out, generator=generator)
        noise = noise @ torch.linalg.cholesky(self.noise_covariance).T
        return x, x @ (self.base + self.change).T + noise


def linear_problem(
    seed: int = 0, *, out: int = 6, inputs: int = 12, correlated: bool = False
) -> LinearProblem:
    """Inputs of condition 100 whose quiet directions carry most of the change: a real trade-off."""
    generator = torch.Generator().manual_seed(seed)
    axes = orthonormal(inputs, inputs, generator)
    spectrum = torch.logspace(0, -2, inputs, dtype=DTYPE)
    noise = torch.logspace(-0.8, 0.5, out, dtype=DTYPE)
    mixing = orthonormal(out, out, generator) if correlated else torch.eye(out, dtype=DTYPE)
    # The change's i-th direction: the i-th quietest axis of the inputs, tilted at random.
    tilted = axes.flip(1)[:, :out] + 0.25 * normal(inputs, out, generator=generator)
    right = torch.linalg.qr(tilted).Q
    sizes = torch.logspace(0.3, -0.5, out, dtype=DTYPE)
    return LinearProblem(
        base=normal(out, inputs, generator=generator) / inputs**0.5,
        change=orthonormal(out, out, generator) @ torch.diag(sizes) @ right.T,
        input_covariance=axes @ torch.diag(spectrum) @ axes.T,
        noise_covariance=mixing @ torch.diag(noise) @ mixing.T,
    )
