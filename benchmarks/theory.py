"""What the methods' objectives say, checked on models where the truth is known.

    python -m benchmarks.theory              # a few minutes, writes benchmarks/results/theory.json
    python -m benchmarks.theory --quick

The constructions stand here, the assertions in ``tests/theory``, the reading in ``docs/theory.md``.
All arithmetic is float64 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorainit.methods.filet import fisher_energy
from lorainit.methods.lora_da import LoraDA
from lorainit.methods.natural import Natural
from lorainit.types import LayerStatistics

DTYPE = torch.float64
SMALL = (40, 160, 640, 2560, 10240)
LARGE = (100, 400, 1600, 6400, 25600)
STATISTICS_SAMPLES = 256
RESULTS = Path(__file__).parent / "results" / "theory.json"


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


# --- (a) a linear model whose fine-tuned estimate is ordinary least squares ------------------


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


def inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.mT


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


def z_score(sample: Tensor, expected: float = 0.0) -> float:
    """How many standard errors the sample's mean lies above what was expected."""
    return float((sample.mean() - expected) / (sample.std() / len(sample) ** 0.5))


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine between two subspaces: one where they are the same."""
    return float((a.T @ b).square().sum() / a.shape[1])


# --- (b) the second-order change of the KL divergence ----------------------------------------


def gram_candidates(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FILet's candidates by its formula: ``U`` ``(out, in)``, ``V`` ``(in, in)``, unit columns."""
    v = nn.functional.normalize(weight.T @ weight, dim=0)
    return nn.functional.normalize(weight @ v, dim=0), v


def svd_candidates(weight: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return u, vh.T


def curvature(divergence: Callable[[Tensor], Tensor], u: Tensor, v: Tensor) -> Tensor:
    """``(k,)``: second derivatives of ``divergence(t u_k v_k^T)`` at 0, by double backward."""
    steps = torch.zeros(u.shape[1], dtype=u.dtype, requires_grad=True)
    slope = torch.autograd.grad(divergence(u * steps @ v.T), steps, create_graph=True)[0]
    every = torch.eye(len(steps), dtype=u.dtype)
    return torch.autograd.grad(slope, steps, every, is_grads_batched=True)[0].diagonal()


def categorical_kl(logits: Tensor, changed: Tensor) -> Tensor:
    """KL of the changed predictions from the unchanged, ``(...)``."""
    base = logits.detach().log_softmax(-1)
    return (base.exp() * (base - changed.log_softmax(-1))).sum(-1)


def tiny_llama(seed: int = 0, steps: int = 250) -> tuple[nn.Module, Tensor, float]:
    """A two-layer Llama trained for seconds on a noisy second-order Markov chain.

    Returns:
        The model in float64, held-out sequences, and its loss on them in nats per token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, length = 16, 16
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
    finally:
        torch.random.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed + 1)
    table = (2.0 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)).softmax(-1)

    def draw(count: int) -> Tensor:
        tokens = torch.randint(vocabulary, (count, 2), generator=generator)
        for _ in range(length - 2):
            chances = table[tokens[:, -2], tokens[:, -1]]
            new = torch.multinomial(chances, 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(steps):
        batch = draw(64)
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    held_out = draw(32)
    with torch.no_grad():
        loss = float(model(input_ids=held_out, labels=held_out).loss)
    model.double().eval().requires_grad_(False)
    return model, held_out, loss


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def sampled_fisher_factors(
    model: nn.Module, tokens: Tensor, draws: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """``Sx`` and ``Sy`` of every layer, labels drawn from the model at every position."""
    layers, inputs, outputs = linear_layers(model), {}, {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            outputs[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    embeddings = model.get_input_embeddings()(tokens).requires_grad_()
    try:
        logits = model(inputs_embeds=embeddings).logits
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(seed)
    chances = logits.detach().softmax(-1).flatten(0, 1)
    sums = {
        name: torch.zeros(layer.out_features, layer.out_features, dtype=DTYPE)
        for name, layer in layers.items()
    }
    for _ in range(draws):
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            g = gradient.flatten(0, 1)
            sums[name] += g.T @ g / (len(g) * draws)
    factors = {}
    for name in layers:
        x = inputs[name].flatten(0, 1)
        factors[name] = x.T @ x / len(x), sums[name]
    return factors


def transformer_divergence(
    model: nn.Module, tokens: Tensor, name: str
) -> Callable[[Tensor], Tensor]:
    """Mean KL per token as a function of a change of one layer's weight."""
    weight = linear_layers(model)[name].weight.detach()
    with torch.no_grad():
        base = model(input_ids=tokens).logits

    def divergence(change: Tensor) -> Tensor:
        parameters = {f"{name}.weight": weight + change}
        changed = torch.func.functional_call(model, parameters, kwargs={"input_ids": tokens})
        return categorical_kl(base, changed.logits).mean()

    return divergence


def transformer_correlations(
    model: nn.Module,
    tokens: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    draws: int = 16,
    names: Iterable[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Per layer: Spearman of measured curvature with the Fisher energy, and with simpler scores."""
    factors = sampled_fisher_factors(model, tokens, draws, seed=3)
    result = {}
    for name in factors if names is None else names:
        weight = linear_layers(model)[name].weight.detach()
        u, v = candidates(weight)
        measured = curvature(transformer_divergence(model, tokens, name), u, v)
        second_in, second_out = factors[name]
        result[name] = {
            "energy": spearman(measured, fisher_energy(u, v, second_in, second_out)),
            "input_part_alone": spearman(measured, (v * (second_in @ v)).sum(0)),
            "output_part_alone": spearman(measured, (u * (second_out @ u)).sum(0)),
            "weight_gain_alone": spearman(measured, (weight @ v).norm(dim=0)),
        }
    return result


# --- the command ------------------------------------------------------------------------------


def error_table(
    problem: LinearProblem, rank: int, samples: int, repeats: int, seed: int
) -> dict[str, object]:
    """Formula and simulation, subspace by subspace, of the three errors at one N."""
    _, inputs = problem.shape
    n = effective_samples(samples, inputs)
    spaces = {
        "lora_da": lora_da_subspace(problem, exact_lora_da(n), rank),
        **other_subspaces(problem, rank),
    }
    drawn = simulate(problem, spaces, samples, repeats, samples + seed, inside=True)
    rows: dict[str, object] = {}
    for name, space in spaces.items():
        terms = {
            "projected": (*projection_terms(problem, space), n),
            **{k: (*v, samples - rank - 1) for k, v in inside_terms(problem, space).items()},
        }
        rows[name] = {
            kind: {
                "bias": bias,
                "variance": variance / freedom,
                "formula": bias + variance / freedom,
                "simulated": float(drawn[name][kind].mean()),
                "z": z_score(drawn[name][kind], bias + variance / freedom),
            }
            for kind, (bias, variance, freedom) in terms.items()
        }
    return rows


def least(rows: dict[str, object], kind: str) -> str:
    return min(rows, key=lambda name: rows[name][kind]["formula"])  # type: ignore[index]


def inside_value(problem: LinearProblem, subspace: Tensor, samples: int, kind: str) -> float:
    bias, variance = inside_terms(problem, subspace)[kind]
    return bias + variance / (samples - subspace.shape[1] - 1)


def pool(problem: LinearProblem, rank: int, count: int, seed: int = 0) -> list[Tensor]:
    """Subspaces of every quality: each method's own, tilted at random by every amount."""
    generator = torch.Generator().manual_seed(seed)
    starts = [*other_subspaces(problem, rank).values()]
    starts += [lora_da_subspace(problem, exact_lora_da(10.0**k), rank) for k in range(1, 6)]
    found = []
    for i in range(count):
        start = starts[i % len(starts)]
        amount = torch.rand((), generator=generator, dtype=DTYPE)
        tilt = amount * normal(*start.shape, generator=generator) / start.shape[0] ** 0.5
        found.append(torch.linalg.qr(start + tilt).Q)
    return found


def rank_agreement(problem: LinearProblem, rank: int, samples: int) -> dict[str, float]:
    """Spearman over many subspaces of LoRA-DA's error with those of training inside."""
    n = effective_samples(samples, problem.shape[1])
    spaces = pool(problem, rank, 500)
    terms = [projection_terms(problem, s) for s in spaces]
    projected = torch.tensor([bias + variance / n for bias, variance in terms])
    return {
        kind: spearman(
            projected, torch.tensor([inside_value(problem, s, samples, kind) for s in spaces])
        )
        for kind in ("weight", "risk")
    }


def regrets(problem: LinearProblem, rank: int, samples: int) -> dict[str, float]:
    """``J(chosen) / J(best)``, J the error of the projected full estimate, per departure.

    Where statistics are estimated, from `STATISTICS_SAMPLES` samples with the data's own labels at
    the base weight, the mean over five draws.
    """
    n = effective_samples(samples, problem.shape[1])
    exact = exact_lora_da(n)
    # Noise in the estimated change adds tr(C) Z^-1 / (n - in - 1) to D D^T: this beta takes it off.
    less_noise = 1 + n / effective_samples(STATISTICS_SAMPLES, problem.shape[1])
    estimated = [
        problem.empirical_statistics(STATISTICS_SAMPLES, torch.Generator().manual_seed(seed))
        for seed in range(5)
    ]
    departures: dict[str, tuple[LoraDA, list[LayerStatistics]]] = {
        "beta_0.03": (exact_lora_da(n, beta=0.03), [problem.statistics()]),
        "beta_0": (exact_lora_da(n, beta=0.0), [problem.statistics()]),
        "damping_0.001_relative": (LoraDA(beta=1.0, population=n), [problem.statistics()]),
        "own_labels": (exact, [problem.empirical_statistics(None)]),
        "estimated": (exact, estimated),
        "estimated_less_noise": (exact_lora_da(n, beta=less_noise), estimated),
        "estimated_defaults": (LoraDA(population=n), estimated),
    }

    def value(method: LoraDA, statistics: LayerStatistics) -> float:
        space = lora_da_subspace(problem, method, rank, statistics)
        bias, variance = projection_terms(problem, space)
        return bias + variance / n

    best = value(exact, problem.statistics())
    return {
        name: sum(value(method, s) for s in every) / (len(every) * best)
        for name, (method, every) in departures.items()
    }


def run_natural(out: int = 16, inputs: int = 24) -> list[dict[str, float]]:
    """The promised decrease of Natural's step by rank, and the share other cuts keep of it."""
    problem = linear_problem(0, out=out, inputs=inputs, correlated=True)
    statistics, method = problem.statistics(), Natural(damping=0.0, damping_mode="absolute")
    x, y = statistics.input_second_moment, statistics.output_second_moment
    hessian, gradient = kron(y, x), statistics.gradient.flatten()
    full = -torch.linalg.solve(hessian, gradient).reshape(out, inputs)
    u, s, vh = torch.linalg.svd(full)

    def decrease(step: Tensor) -> float:
        d = step.flatten()
        return -float(gradient @ d + 0.5 * d @ hessian @ d)

    found = []
    for rank in (1, 2, 4, 8, out):
        factors = method.solve(problem.base, statistics, rank, 1.0)
        best = decrease(factors.B @ factors.A)
        promised = 0.5 * float(method.singular_values(statistics, rank).square().sum())
        cut = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        found.append(
            {
                "rank": rank,
                "share_of_the_full_step": best / decrease(full),
                "deviation_from_eckart_young": abs(best / promised - 1),
                "euclidean_cut_keeps": decrease(cut) / best,
            }
        )
        print("natural", found[-1])
    return found


def provenance() -> dict[str, object]:
    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    import transformers

    return {
        "command": "python -m benchmarks.theory",
        "commit": git("rev-parse", "HEAD"),
        "changed_files": sorted(
            line[3:]
            for line in git("status", "--porcelain", "src", "benchmarks").splitlines()
            if line.endswith(".py")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float64, CPU",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_linear(out: int, inputs: int, rank: int, samples: Iterable[int], draws: int) -> dict:
    result: dict[str, object] = {"out": out, "in": inputs, "rank": rank}
    problems = {seed: linear_problem(seed, out=out, inputs=inputs) for seed in range(3)}
    for n in samples:
        tables = {
            seed: error_table(problem, rank, n, max(100, min(draws, 3_000_000 // n)), seed)
            for seed, problem in problems.items()
        }
        scores = torch.tensor(
            [v["z"] for rows in tables.values() for row in rows.values() for v in row.values()]
        )
        result[str(n)] = {
            "seed_0": tables[0],
            "largest_z": float(scores.abs().max()),
            "z_root_mean_square": float(scores.square().mean().sqrt()),
            "comparisons": len(scores),
            "least": {
                kind: [least(rows, kind) for rows in tables.values()]
                for kind in ("projected", "weight", "risk")
            },
            "spearman_with_projected": [
                rank_agreement(problem, rank, n) for problem in problems.values()
            ],
            "regret_of_projected": [regrets(problem, rank, n) for problem in problems.values()],
        }
        entry = result[str(n)]
        print(f"in={inputs} N={n}", json.dumps({k: entry[k] for k in entry if k != "seed_0"}))
    return result


def run_transformer(seeds: int, draws: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for seed in range(seeds):
        model, tokens, loss = tiny_llama(seed)
        entry: dict[str, object] = {"seed": seed, "loss": loss}
        for name, candidates in (("gram", gram_candidates), ("svd", svd_candidates)):
            layers = transformer_correlations(model, tokens, candidates, draws=draws)
            energy = torch.tensor([row["energy"] for row in layers.values()])
            entry[name] = {
                "mean": {
                    score: sum(row[score] for row in layers.values()) / len(layers)
                    for score in next(iter(layers.values()))
                },
                "least": float(energy.min()),
                "median": float(energy.median()),
                "layers": layers,
            }
            print(f"transformer seed={seed} {name}", entry[name]["mean"], float(energy.min()))
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start, origin = time.perf_counter(), provenance()
    results: dict[str, object] = {
        "linear_small": run_linear(6, 12, 3, (40, 640) if quick else SMALL, 3000),
        "natural": run_natural(),
        "transformer": run_transformer(1 if quick else 3, 4 if quick else 64),
    }
    if not quick:
        results["linear_large"] = run_linear(24, 48, 6, LARGE, 1000)
        results["provenance"] = {**origin, "seconds": round(time.perf_counter() - start, 1)}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
