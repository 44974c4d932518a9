"""Tables of the linear model: errors, agreement of rankings, regret of departures."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.studies.theory.algebra import DTYPE, kron, normal, spearman, z_score
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
from lorainit.methods import LoraDA, Natural
from lorainit.types import LayerStatistics

SMALL = (40, 160, 640, 2560, 10240)

LARGE = (100, 400, 1600, 6400, 25600)

STATISTICS_SAMPLES = 256


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
