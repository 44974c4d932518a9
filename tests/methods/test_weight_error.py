"""Methods that give back what quantization took, over shapes, ranks and damping."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorainit.methods import QERA, KroneckerQER, LoftQ
from lorainit.types import LayerStatistics
from tests.methods.common import damped, layer, product, root, solve, tail

shapes = st.tuples(st.integers(2, 24), st.integers(2, 24))


def left(found: Tensor, error: Tensor, y: Tensor, x: Tensor) -> float:
    return float((y @ (error - found) @ x).norm())


@settings(max_examples=40, deadline=None)
@given(shapes, st.data(), st.sampled_from([1e-4, 1e-2, 0.3, 10.0]), st.integers(0, 10_000))
def test_each_is_the_best_in_its_own_metric(
    shape: tuple[int, int], draw: st.DataObject, damping: float, seed: int
) -> None:
    """The least that a matrix of the rank can leave, and so never more than another method leaves."""
    out, inner = shape
    rank = draw.draw(st.integers(1, min(shape)))
    weight, statistics = layer(out=out, inner=inner, seed=seed)
    error = statistics.weight_error
    assert error is not None
    x = root(damped(statistics.input_second_moment, damping), 0.5)
    y = root(damped(statistics.output_second_moment, damping), 0.5)
    diagonal = statistics.input_second_moment.diagonal().sqrt().diag()
    ones = torch.eye(out, dtype=x.dtype), torch.eye(inner, dtype=x.dtype)
    metrics: dict[Any, tuple[Tensor, Tensor]] = {
        LoftQ(): ones,
        QERA(damping=damping): (ones[0], x),
        QERA("diagonal"): (ones[0], diagonal),
        KroneckerQER(damping=damping): (y, x),
    }
    found = {m: product(solve(m, weight, statistics, rank)) for m in metrics}
    for method, (before, after) in metrics.items():
        whole = float((before @ error @ after).norm())
        own = left(found[method], error, before, after)
        assert abs(own - tail(before @ error @ after, rank)) < 1e-7 * whole
        assert all(
            own <= left(other, error, before, after) + 1e-7 * whole for other in found.values()
        )


def test_units_of_the_loss_do_not_matter() -> None:
    """Gradients a billion times smaller, in float32, are the same start."""
    weight, statistics = layer(dtype=torch.float32)
    small = LayerStatistics(
        **{f: getattr(statistics, f) for f in (*statistics.TENSORS, *statistics.COUNTS)},
        weight_error=statistics.weight_error,
    ).to()
    assert small.output_second_moment_sum is not None
    small.output_second_moment_sum.mul_(1e-18)
    found = solve(KroneckerQER(), weight, small)
    wanted = solve(KroneckerQER(), *layer(dtype=torch.float32))
    assert (product(found) - product(wanted)).norm() < 1e-4 * product(wanted).norm()
