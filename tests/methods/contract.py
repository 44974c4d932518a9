"""The contract, measured for every method in the table."""

from __future__ import annotations

import torch

from lorainit.methods import METHODS
from lorainit.types import Factors
from tests.methods.common import IN, OUT, RANK, Check, layer, product, relative, solve

DRAWN = frozenset({"vanilla", "gaussian", "orthogonal", "init-ab", "gora"})
"""Methods that draw at random: another dtype is another draw."""

FULL_RANK = {"lora-ga": OUT // 2}
"""The largest rank of methods that cannot have ``min(out, in)``."""

SCALED_OUT = (
    "pissa",
    "milora",
    "loftq",
    "corda",
    "qera",
    "filet",
    "kronecker-qer",
    "natural",
    "gora",
    "random",
)
"""Methods whose published ``s B A`` does not depend on ``s``."""


def largest_difference(found: Factors, wanted: Factors) -> float:
    """Largest relative difference of the two factors, entry by entry."""
    return max(relative(found.A, wanted.A), relative(found.B, wanted.B))


def shapes(method: str) -> float:
    """Number of results, over ranks and dtypes, with a wrong shape or dtype, or not finite."""
    wrong = 0
    lowest = 2 if method in ("orthogonal", "loram") else 1
    for dtype in (torch.float32, torch.float64):
        for rank in (lowest, RANK, FULL_RANK.get(method, OUT)):
            weight, statistics = layer(2, dtype=dtype)
            found = solve(method, weight, statistics, rank)
            good = (
                found.A.shape == (2, rank, IN)
                and found.B.shape == (2, OUT, rank)
                and found.A.dtype == found.B.dtype == dtype
                and bool(found.A.isfinite().all() and found.B.isfinite().all())
            )
            wrong += not good
    return float(wrong)


def repeated(method: str) -> float:
    """The same input twice."""
    return largest_difference(solve(method, *layer()), solve(method, *layer()))


def stacked(method: str) -> float:
    """A stack of layers against its layers one by one, drawing methods from one generator."""
    weight, statistics = layer(3)
    together = solve(method, weight, statistics)
    torch.manual_seed(0)
    worst = 0.0
    for index in range(3):
        parts = {
            name: None if (t := getattr(statistics, name)) is None else t[index]
            for name in (*statistics.TENSORS, "weight_error")
        }
        counts = {name: getattr(statistics, name) for name in statistics.COUNTS}
        alone = type(statistics)(**parts, **counts, population=statistics.population)
        one = METHODS[method]().solve(weight[index], alone, RANK, 2.0)
        worst = max(worst, largest_difference(together[index], one))
    return worst


def single_precision(method: str) -> float:
    """``s B A`` (or A, where that is zero) in float32 against float64."""
    low, high = solve(method, *layer(dtype=torch.float32)), solve(method, *layer())
    if float(product(high).norm()) == 0:
        return relative(low.A.mT @ low.A, high.A.mT @ high.A)
    return relative(product(low), product(high))


def half_weight(method: str) -> float:
    """A bfloat16 weight against the same numbers in float32; infinite for another output dtype."""
    weight, statistics = layer(dtype=torch.float32)
    weight = weight.bfloat16()
    found = solve(method, weight, statistics)
    if found.A.dtype != torch.float32 or found.B.dtype != torch.float32:
        return float("inf")
    return largest_difference(found, solve(method, weight.float(), statistics))


def transposed(method: str) -> float:
    """A weight stored as (in, out), seen through a transpose."""
    weight, statistics = layer()
    stored = weight.mT.contiguous().mT
    assert not stored.is_contiguous()
    return largest_difference(solve(method, stored, statistics), solve(method, weight, statistics))


def scaled_out(method: str) -> float:
    """``s B A`` at another ``s``."""
    paper = METHODS[method].paper()  # type: ignore[attr-defined]
    one, other = solve(paper, *layer(), scaling=0.25), solve(paper, *layer(), scaling=8.0)
    return relative(product(one, 0.25), product(other, 8.0))


def not_scaled_out() -> float:
    """Control: LoRA-One leaves the scaling on top, so its ``s B A`` follows it."""
    return scaled_out("lora-one")


CHECKS = [
    Check(method, name, bound, lambda measure=measure, method=method: measure(method))  # type: ignore[misc]
    for method in METHODS
    for name, bound, measure in (
        ("shapes, dtypes, finite", 0.0, shapes),
        ("deterministic", 0.0, repeated),
        ("stack = layers one by one", 1e-9, stacked),
        ("float32 = float64", 1e-5, single_precision),
        ("bfloat16 weight", 0.0, half_weight),
        ("transposed storage", 1e-9, transposed),
        ("scaling divided out", 1e-10, scaled_out),
    )
    if not (measure is single_precision and method in DRAWN)
    and not (measure is scaled_out and method not in SCALED_OUT)
] + [Check("lora-one", "control: scaling stays on top", 0.5, not_scaled_out, control=True)]
