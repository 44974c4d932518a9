"""``lorainit methods``: what there is."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from lorainit.methods import METHODS
from lorainit.types import LayerStatistics, Method, ReadsReference, settings_of


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The table of methods."""
    del options
    table = {name: _describe(name, kind) for name, kind in METHODS.items()}
    wide = max(map(len, table))
    lines = [f"{'method':<{wide}}  {'outputs at first':<16}  reads"]
    for name, entry in table.items():
        reads = ", ".join(filter(None, [*entry["needs"], entry["reads"]]))
        lines.append(f"{name:<{wide}}  {entry['start']:<16}  {reads}")
        settings = ", ".join(f"{k}={v!r}" for k, v in entry["settings"].items())
        if settings:
            lines.append(f"{'':<{wide}}  --set {settings}")
    return table, "\n".join(lines)


def _describe(name: str, kind: type) -> dict[str, Any]:
    method: Any = kind()
    if isinstance(method, ReadsReference) and method.needs_reference:
        reads = "the full-precision weight"
    elif method.needs:
        reads = ""
    else:
        random = name in ("vanilla", "gaussian", "orthogonal", "init-ab")
        reads = "nothing" if random else "the weight"
    settings = settings_of(method)
    del settings["method"]
    return {
        "summary": (kind.__doc__ or "").strip().splitlines()[0],
        "needs": sorted(method.needs),
        "reads": reads,
        "start": start_of(method),
        "settings": settings,
    }


def start_of(method: Method) -> str:
    """What the model computes at first, seen on a small layer."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient, x, y, error = torch.randn(5, 8, 8, generator=generator)
    statistics = LayerStatistics.from_means(
        gradient=gradient,
        input_second_moment=x @ x.mT,
        input_mean=x.mean(0),
        output_second_moment=y @ y.mT,
        population=16.0,
    )
    statistics = dataclasses.replace(statistics, weight_error=error)
    with torch.random.fork_rng(devices=[]):
        pair = method.solve(weight, statistics, 2, 1.0)
    if pair.anchored:
        return "kept (anchored)"
    if not bool(pair.B.any()):
        return "kept (B = 0)"
    product, sizes = (pair.B @ pair.A).norm(), pair.B.norm() * pair.A.norm()
    return "displaced" if product > 1e-4 * sizes else "kept (B A = 0)"
