"""Thin products and factorizations in several kinds of arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.studies.solver.harness import Study
from lorainit.linalg.split_precision import SplitMatrix, multiply
from lorainit.linalg.triangular import Triangle, gram_of_lower, lower_inverse


def thin_products(study: Study, m: int, n: int, batch: int) -> dict[str, Any]:
    """One matrix of a batch times a thin block, milliseconds; the bytes alone at 4.8 TB/s beside it."""
    matrix = torch.randn(batch, m, n, device=study.device)
    halves = SplitMatrix.of(matrix)
    high = halves.parts[:, :m]
    found: dict[str, Any] = {"bytes": round(4 * m * n / 4.8e9, 3)}
    for width in (24, 32, 96):
        x = torch.randn(batch, n, width, device=study.device)
        y = torch.randn(batch, m, width, device=study.device)
        own = {
            "float32": study.milliseconds(lambda x=x: matrix @ x),
            "float32 T": study.milliseconds(lambda y=y: matrix.mT @ y),
            "halves": study.milliseconds(lambda x=x: halves.times(x)),
            "halves T": study.milliseconds(lambda y=y: halves.transposed_times(y)),
            "half alone": study.milliseconds(lambda x=x: multiply(high, x.half())),
        }
        if study.device.type == "cuda":
            before = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = True
            own["tf32"] = study.milliseconds(lambda x=x: matrix @ x)
            own["tf32 T"] = study.milliseconds(lambda y=y: matrix.mT @ y)
            torch.backends.cuda.matmul.allow_tf32 = before
        found[str(width)] = {
            k: round(v / batch, 4) if isinstance(v, float) else v for k, v in own.items()
        }
    exact = matrix[:1].double() @ x[:1].double()
    for name, got in (
        ("float32", matrix[:1] @ x[:1]),
        ("halves", halves.times(x)[:1]),
    ):
        found[f"error {name}"] = float((got - exact).norm() / exact.norm())
    return found


def factorizations(study: Study, n: int, other: int) -> dict[str, Any]:
    """Of one matrix with a falling spectrum, milliseconds; errors against float64."""
    x = torch.randn(2 * n, n, device=study.device) * (
        torch.arange(1, n + 1, device=study.device) ** -0.5
    )
    second = (x.mT @ x / (2 * n)).double().unsqueeze(0)
    del x
    second.diagonal(dim1=-2, dim2=-1).add_(1e-3 * second.diagonal(dim1=-2, dim2=-1).mean())
    ms = study.milliseconds
    found: dict[str, Any] = {"cholesky": ms(lambda: torch.linalg.cholesky_ex(second[0])[0], 2)}
    lower = torch.linalg.cholesky_ex(second[0])[0].unsqueeze(0)
    triangle = Triangle(lower)
    thin = torch.randn(1, n, 64, device=study.device, dtype=torch.float64)
    wide = torch.randn(1, n, other, device=study.device)
    found |= {
        "inverse, float64": ms(lambda: lower_inverse(lower), 2),
        **{f"Triangle {b}": ms(lambda b=b: Triangle(lower, b), 2) for b in (512, 1024, 2048)},
        **{
            f"thin solve {b}": ms(partial(Triangle(lower, b).solve, thin))
            for b in (512, 1024, 2048)
        },
        "thin solve T": ms(lambda: triangle.solve_transposed(thin)),
        "thin trsm": ms(lambda: torch.linalg.solve_triangular(lower, thin, upper=False), 2),
        "inverse in halves": ms(triangle.inverse_quickly, 2),
        "inverse in halves, 1024": ms(Triangle(lower, 1024).inverse_quickly, 2),
        "wide solve in halves": ms(lambda: triangle.solve_quickly(wide), 2),
        "wide solve in halves, 1024": ms(lambda: Triangle(lower, 1024).solve_quickly(wide), 2),
        "wide trsm, float64": ms(
            lambda: torch.linalg.solve_triangular(lower, wide.double(), upper=False), 2
        ),
    }
    exact = lower_inverse(lower)
    quick = triangle.inverse_quickly()
    found["gram of the inverse in halves"] = ms(lambda: gram_of_lower(quick.clone()), 2)
    found["SplitMatrix.of"] = ms(lambda: SplitMatrix.of(quick), 2)
    found["error inverse"] = float(
        torch.linalg.matrix_norm(quick - exact) / torch.linalg.matrix_norm(exact)
    )
    truth = exact @ wide.double()
    found["error wide solve"] = float((triangle.solve_quickly(wide) - truth).norm() / truth.norm())
    found["error thin solve"] = float(
        (triangle.solve(thin) - exact @ thin).norm() / (exact @ thin).norm()
    )
    return found
