"""Single operations of a pass and a solve, in milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common.clock import Clock, cleared
from benchmarks.common.decoder import Case
from benchmarks.common.package_internals import (
    add_gram,
    add_product,
    add_squares,
    inverse_of_triangle,
)


def run_operations(case: Case, model: nn.Module | None, clock: Clock) -> dict[str, Any]:
    """Single operations, milliseconds."""
    device, shape = clock.device, case.sizes()
    found: dict[str, Any] = {}

    def timed(name: str, work: Callable[[], Any], repeats: int = 3) -> None:
        try:
            work()
            clock.wait()
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            clock.wait()
            found[name] = round((time.perf_counter() - begin) / repeats * 1e3, 4)
        except Exception as error:  # an operation that this build lacks is a result
            found[name] = f"{type(error).__name__}: {error}"[:200]

    for n in (shape.hidden, shape.inner):
        x = torch.randn(4096, n, device=device).bfloat16()
        total = torch.zeros(n, n, device=device)
        timed(f"gram {n} bf16 out", lambda x=x: x.mT @ x)
        timed(f"gram {n} fp32 out", lambda x=x, t=total: add_product(t, x, x))
        timed(f"gram {n} folded", lambda x=x, t=total: add_gram(t, x))
        timed(f"squares {n}", lambda x=x: add_squares(None, x))
        wide = x.float()
        second = (wide.mT @ wide) / 4096
        second.diagonal().add_(1e-2)
        for dtype in (torch.float32, torch.float64):
            s, tag = second.to(dtype), str(dtype)[-2:]
            timed(f"cholesky {n} {tag}", lambda s=s: torch.linalg.cholesky_ex(s)[0], 2)
            lower = torch.linalg.cholesky_ex(s)[0]
            thin = torch.randn(n, 16, device=device, dtype=dtype)
            right = torch.randn(n, shape.hidden, device=device, dtype=dtype)
            timed(f"product {n} {tag}", lambda s=s, r=right: s @ r, 2)
            timed(f"thin product {n} {tag}", lambda s=s, r=thin: s @ r)
            timed(
                f"triangular solve {n} {tag}",
                lambda a=lower, r=right: torch.linalg.solve_triangular(a, r, upper=False),
                2,
            )
            timed(
                f"thin triangular solve {n} {tag}",
                lambda a=lower, r=thin: torch.linalg.solve_triangular(a, r, upper=False),
            )
            timed(f"inverse {n} {tag}", lambda a=lower: inverse_of_triangle(a.unsqueeze(0)), 2)
            if n == shape.hidden:
                timed(f"qr {n} {tag}", lambda r=thin: torch.linalg.qr(r))
        cleared()
    for n in (48, 96, 192):
        small = torch.randn(8, n, n, device=device, dtype=torch.float64)
        small = small + small.mT
        timed(f"eigh 8 x {n}", lambda s=small: torch.linalg.eigh(s))
    return {"milliseconds": found}
