"""How far ``fast`` is from ``exact``, and LoRA-DA's objective beside other solvers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.clock import Clock
from benchmarks.common.decoder import Case
from benchmarks.common.subspaces import sine_between
from benchmarks.speed.starts import collected, started
from lorainit.methods import LoraDA
from lorainit.types import LayerStatistics


def run_precision(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """How far `fast` is from `exact`: angle of A's row spaces, and of B A, largest over the layers."""
    found = collected(replace(case, method="natural"), model, clock)
    apart: dict[str, dict[str, float]] = {}
    for name in ("lora_da", "filet", "natural"):
        fast = started(case, model, clock, found, name)
        seconds = clock.seconds[f"solve {name}"]
        exact = started(case, model, clock, found, name, precision="exact")
        angle, change = 0.0, 0.0
        for key in fast:
            if "lora_A" not in key:
                continue
            other = key.replace("lora_A", "lora_B")
            (a, b), (c, d) = ((f[key].double(), f[other].double()) for f in (fast, exact))
            angle = max(angle, sine_between(a.mT, c.mT))
            miss = torch.linalg.norm(b @ a - d @ c) / torch.linalg.norm(d @ c)
            change = max(change, float(miss))
        apart[name] = {
            "sine": angle,
            "product": change,
            "fast_seconds": seconds,
            "exact_seconds": clock.seconds[f"solve {name}"],
        }
    return {"apart": apart}


def run_objective(case: Case, model: nn.Module, clock: Clock) -> dict[str, Any]:
    """LoRA-DA's own objective, beside that of ten LOBPCG iterations from a random start."""
    found = collected(case, model, clock)
    factors = started(case, model, clock, found, "lora_da")
    method, values = LoraDA(), {}
    for key, a in factors.items():
        if "lora_A" not in key:
            continue
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        omega = objective_matrix(found[name], method)
        n = omega.shape[-1]
        torch.manual_seed(0)
        start = torch.randn(n, case.rank, device=omega.device)
        released = torch.lobpcg(omega.float(), X=start, niter=10, largest=False)[1]
        best = torch.linalg.eigvalsh(omega)[: case.rank].sum() if n <= 4096 else None
        values[name] = {
            "ours": subspace_value(omega, a.mT),
            "lobpcg": subspace_value(omega, released),
            "least": None if best is None else float(best),
        }
    return {"objective": values}


def objective_matrix(layer: LayerStatistics, method: LoraDA) -> Tensor:
    """LoRA-DA's `Omega`, dense in float64, straight from the formula."""
    second = layer.input_second_moment.double()
    y = layer.output_second_moment_diagonal.double()
    z = second + method.damping * second.diagonal().mean() * torch.eye(
        len(second), dtype=second.dtype, device=second.device
    )
    y = y + method.damping * y.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(z))
    change = -(inverse @ layer.gradient.double().mT) / y
    sigma = torch.linalg.eigvalsh(change @ change.mT)[-1].sqrt()
    known = layer.population if layer.population is not None else layer.sequences
    variance = method.beta * (1 / y).sum() / (float(known) * sigma**2)
    return variance * inverse - method.bias_weight * (change @ change.mT) / sigma**2


def subspace_value(omega: Tensor, basis: Tensor) -> float:
    """``tr(Q^T Omega Q)`` for an orthonormal basis ``Q`` of the columns."""
    q = torch.linalg.qr(basis.double())[0]
    return float(torch.trace(q.mT @ omega @ q))
