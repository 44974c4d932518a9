"""Time to solve all 210 target layers of SmolLM2-135M, statistics given."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from lorainit.methods import METHODS
from lorainit.types import LayerStatistics

SHAPES = {
    "q, o": (60, 576, 576),
    "k, v": (60, 192, 576),
    "gate, up": (60, 1536, 576),
    "down": (30, 576, 1536),
}
"""Layers, out and in of SmolLM2-135M's target layers: 210 in all."""


def speed_case(layers: int, out: int, inner: int) -> tuple[torch.Tensor, LayerStatistics]:
    """A stack of random weights with second moments whose spectra fall as one over the index."""
    rng = torch.Generator().manual_seed(0)

    def moment(n: int) -> torch.Tensor:
        x = torch.randn(layers, 2 * n, n, generator=rng) * torch.arange(1, n + 1) ** -0.5
        q = torch.linalg.qr(torch.randn(n, n, generator=rng)).Q
        return q @ (x.mT @ x / (2 * n)) @ q.mT

    second_in, second_out = moment(inner), moment(out) * 1e-6
    noise = torch.randn(layers, out, inner, generator=rng)
    weight = torch.randn(layers, out, inner, generator=rng) / inner**0.5
    found = LayerStatistics.from_means(
        gradient=second_out @ noise @ second_in * 1e3,
        input_second_moment=second_in,
        input_mean=second_in[:, 0] * 0.1,
        output_second_moment=second_out,
        population=256.0,
    )
    # What methods for quantized bases give back: rounding, about evenly spread.
    return weight, replace(found, weight_error=0.01 * torch.randn(weight.shape, generator=rng))


def speed(layers: int) -> list[dict[str, object]]:
    """Seconds for 210 layers at rank 8 in float32, from stacks of `layers`, scaled up by shape."""
    cases = [(count, *speed_case(layers, out, inner)) for count, out, inner in SHAPES.values()]
    rows: list[dict[str, object]] = []
    print(f"\n{'method':12s}{'seconds for 210 layers':>24s}  ({torch.get_num_threads()} threads)")
    for method, kind in METHODS.items():
        wall, busy = 0.0, 0.0
        for count, weight, statistics in cases:
            start = time.perf_counter(), time.process_time()
            kind().solve(weight, statistics, 8, 2.0)
            wall += (time.perf_counter() - start[0]) * count / layers
            busy += (time.process_time() - start[1]) * count / layers
        rows.append({"method": method, "wall_s": wall, "cpu_s": busy, "layers_timed": layers})
        print(f"{method:12s}{wall:>24.1f}", flush=True)
    return rows
