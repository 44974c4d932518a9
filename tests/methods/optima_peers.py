"""The optima of peers: Astra, FARSS, LoRAM, Init[AB], GoRA, CG-LoRA, and of the control `Random`."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from lorainit.methods import (
    FARSS,
    METHODS,
    Astra,
    CGLoRA,
    FILet,
    GoRA,
    InitAB,
    LoRAM,
    LoraOne,
    MiLoRA,
    Natural,
    PiSSA,
    Random,
)
from tests.methods.common import (
    IN,
    OUT,
    RANK,
    SCALING,
    Check,
    angle,
    damped,
    excess,
    layer,
    product,
    relative,
    root,
    solve,
    tail,
    truncated,
)

WEIGHT, STATISTICS = layer()
G, SX, SY = STATISTICS.gradient, STATISTICS.input_second_moment, STATISTICS.output_second_moment
OUTPUTS = WEIGHT @ SX @ WEIGHT.mT


def factors(method: object) -> tuple[Tensor, Tensor]:
    found = solve(method, WEIGHT, STATISTICS)
    return found.A, found.B


# --- Astra ----------------------------------------------------------------------------------


def missed_outputs(subspace: Tensor) -> float:
    """Root mean square of the outputs that the projection on a span of outputs leaves out."""
    rest = WEIGHT - subspace @ torch.linalg.pinv(subspace) @ WEIGHT
    return float((rest @ SX @ rest.mT).trace().sqrt())


def astra_keeps_most_of_the_outputs() -> float:
    a, b = factors(Astra())
    rest = WEIGHT - b @ a
    error = float((rest @ SX @ rest.mT).trace().sqrt())
    return excess(error, tail(WEIGHT @ root(SX, 0.5), RANK))


def astra_weight_alone_keeps_less() -> float:
    return missed_outputs(factors(PiSSA())[1]) / missed_outputs(factors(Astra())[1]) - 1.0


def captured(vectors: Tensor) -> float:
    basis = torch.linalg.qr(vectors).Q
    return float((basis.mT @ OUTPUTS @ basis).trace())


def astra_lowest_takes_least() -> float:
    least = float(torch.linalg.eigvalsh(OUTPUTS)[:RANK].sum())
    return excess(captured(factors(Astra("lowest"))[1]), least)


def astra_weight_alone_takes_more() -> float:
    return captured(factors(MiLoRA())[1]) / captured(factors(Astra("lowest"))[1]) - 1.0


# --- FARSS ----------------------------------------------------------------------------------


def triplets() -> list[tuple[float, Tensor]]:
    """Every singular triplet with its energy ``tr(Sy D Sx D^T)``, written out."""
    u, s, vh = torch.linalg.svd(WEIGHT, full_matrices=False)
    terms = [s[k] * torch.outer(u[:, k], vh[k]) for k in range(OUT)]
    return [(float((SY * (term @ SX @ term.mT)).sum()), term) for term in terms]


def farss_takes_the_extreme_set(highest: bool) -> float:
    """Against all sets of four triplets."""
    sets = itertools.combinations(triplets(), RANK)
    sums = [(sum(e for e, _ in chosen), [t for _, t in chosen]) for chosen in sets]
    best = (max if highest else min)(sums, key=lambda item: item[0])[1]
    a, b = factors(FARSS(highest_from=1 if highest else 128))
    return relative(b @ a, torch.stack(best).sum(0)) + relative(b.mT @ b, a @ a.mT)


def farss_is_not_filet() -> float:
    """Control: FILet's energies lack the squared singular value."""
    a, b = factors(FARSS())
    other = factors(FILet("svd", "lowest", 1e-8))
    return angle(b, other[1]) + angle(a.mT, other[0].mT)


def farss_importance_is_the_kronecker_form() -> float:
    """``w^T (Sx (x) Sy) w`` for the weight's columns under one another."""
    column = WEIGHT.mT.reshape(-1)
    form = column @ torch.kron(SX, SY) @ column
    return relative(FARSS().importance(WEIGHT, STATISTICS) * WEIGHT.numel(), form)


# --- LoRAM and Init[AB] ---------------------------------------------------------------------


def second_difference(size: int) -> Tensor:
    """Minus the second derivative on a grid, zero at both ends: the sine basis diagonalises it."""
    ones = torch.ones(size - 1, dtype=torch.float64)
    return 2 * torch.eye(size, dtype=torch.float64) - torch.diag(ones, 1) - torch.diag(ones, -1)


def smoothest(size: int) -> Tensor:
    return torch.linalg.eigh(second_difference(size))[1][:, :RANK]


def loram_takes_the_smoothest() -> float:
    a, b = factors(LoRAM())
    return angle(a.mT, smoothest(IN)) + angle(b, smoothest(OUT))


def loram_magnitude() -> float:
    a, b = factors(LoRAM())
    wanted = math.sqrt(math.log(RANK) / math.log(OUT)) * float(WEIGHT.norm())
    grams = [relative(g, g[0, 0] * torch.eye(RANK, dtype=g.dtype)) for g in (a @ a.mT, b.mT @ b)]
    return excess(float((b @ a).norm()), wanted) + sum(grams) + relative(a @ a.mT, b.mT @ b)


def loram_reads_no_direction() -> float:
    """Control: PiSSA's directions are others."""
    return angle(factors(PiSSA())[0].mT, smoothest(IN))


def spread_of(method: InitAB) -> tuple[float, float]:
    """Root mean squares of both factors, over those of LoRA's ``A``."""
    weight, statistics = layer(out=300, inner=200)
    found = solve(method, weight, statistics, rank=100)
    unit = (3 * 200) ** -0.5
    return tuple(float(f.square().mean().sqrt()) / unit for f in (found.A, found.B))  # type: ignore[return-value]


def init_ab_has_the_variance() -> float:
    a, b = spread_of(InitAB(scale_a=4.0, scale_b=0.25))
    return max(abs(a / 2.0 - 1), abs(b / 0.5 - 1))


def init_ab_other_variance() -> float:
    return abs(spread_of(InitAB())[1] / spread_of(InitAB(scale_b=0.5))[1] - 1)


# --- GoRA -----------------------------------------------------------------------------------


def gora_is_stationary(fitted: bool) -> float:
    """What is left of the step has nothing in the span of ``A``, relative to what there was."""
    a, b = factors(GoRA())
    step = -0.05 * (IN / RANK) ** 0.5 * G
    if not fitted:
        b = step @ a.mT
    return float(((step - SCALING * b @ a) @ a.mT).norm() / (step @ a.mT).norm())


def gora_length() -> float:
    """Mean of ``|s B A|^2`` over many draws against ``length^2 |G|^2``."""
    many = dataclasses.replace(
        STATISTICS, gradient_sum=STATISTICS.gradient_sum.expand(2000, -1, -1)
    )  # type: ignore[union-attr]
    found = solve(GoRA(length=0.3), WEIGHT.expand(2000, -1, -1), many)
    squares = product(found).square().sum((-2, -1))
    return excess(float(squares.mean().sqrt()), 0.3 * float(G.norm()))


# --- CG-LoRA --------------------------------------------------------------------------------

DAMPED = {"input": damped(SX, CGLoRA().damping), "output": damped(SY, CGLoRA().damping)}


def whitening(sides: str, power: float) -> tuple[Tensor, Tensor]:
    """Symmetric roots: other ones than the package's."""
    return tuple(  # type: ignore[return-value]
        root(DAMPED[side], power) if sides in (side, "both") else torch.eye(size, dtype=G.dtype)
        for side, size in (("output", OUT), ("input", IN))
    )


def cg_lora_is_the_dense_step(sides: str) -> float:
    y, x = whitening(sides, -0.5)
    step = y @ truncated(-y @ G @ x, RANK) @ x
    step = step / (128.0 * torch.linalg.matrix_norm(step, 2))
    a, b = factors(CGLoRA(sides=sides))  # type: ignore[arg-type]
    return relative(b @ a, step) + relative(a @ a.mT, b.mT @ b)


def metric_error(step: Tensor) -> float:
    """Distance to the full Newton-like step in the curvature's metric, at the step's best length."""
    y, x = whitening("both", 0.5)
    full = -torch.linalg.solve(DAMPED["output"], torch.linalg.solve(DAMPED["input"], G.mT).mT)
    mine, theirs = y @ step @ x, y @ full @ x
    return float((theirs - mine * (mine * theirs).sum() / mine.square().sum()).norm())


def cg_lora_is_nearest_in_the_metric() -> float:
    a, b = factors(CGLoRA())
    y, x = whitening("both", -0.5)
    return excess(metric_error(b @ a), tail(y @ G @ x, RANK))


def other_directions_are_farther(method: object) -> float:
    best, other = (b @ a for a, b in (factors(CGLoRA()), factors(method)))
    return metric_error(other) / metric_error(best) - 1.0


def cg_lora_is_naturals_direction() -> float:
    one, other = (b @ a for a, b in (factors(CGLoRA()), factors(Natural())))
    return relative(one / one.norm(), other / other.norm())


# --- the control ----------------------------------------------------------------------------


def random_keeps_every_size(name: str) -> float:
    """Inner products of rows and columns, and the product's singular values."""
    like = METHODS[name]()
    theirs, ours = solve(like, WEIGHT, STATISTICS), solve(Random(like=like), WEIGHT, STATISTICS)
    assert ours.anchored == theirs.anchored
    pairs = [(f.A @ f.A.mT, f.B.mT @ f.B) for f in (theirs, ours)]
    grams = [relative(found, wanted) for wanted, found in zip(*pairs, strict=True)]
    # The products of some are zero to rounding.
    size = float(theirs.A.norm() * theirs.B.norm()) or 1.0
    values, wanted = (torch.linalg.svdvals(product(f)) for f in (ours, theirs))
    return max(*grams, float((values - wanted).norm()) / size)


def random_turns_both_factors() -> float:
    """Control: neither span is the other method's."""
    (a, b), (other_a, other_b) = factors(Natural()), factors(Random())
    return min(angle(a.mT, other_a.mT), angle(b, other_b))


def random_seeds_differ() -> float:
    return relative(factors(Random(seed=1))[0], factors(Random())[0])


PEERS = [
    Check("astra", "Eckart-Young for the outputs", 1e-10, astra_keeps_most_of_the_outputs),
    Check("astra", "control: the weight alone", 1e-2, astra_weight_alone_keeps_less, control=True),
    Check("astra", "lowest: least of the outputs", 1e-8, astra_lowest_takes_least),
    Check("astra", "control: minor weights", 0.05, astra_weight_alone_takes_more, control=True),
    Check("farss", "least of all sets", 1e-10, lambda: farss_takes_the_extreme_set(False)),
    Check("farss", "most of all sets", 1e-10, lambda: farss_takes_the_extreme_set(True)),
    Check("farss", "importance, Kronecker form", 1e-10, farss_importance_is_the_kronecker_form),
    Check("farss", "control: FILet's energies", 0.5, farss_is_not_filet, control=True),
    Check("loram", "smoothest bases", 1e-10, loram_takes_the_smoothest),
    Check("loram", "magnitude", 1e-10, loram_magnitude),
    Check("loram", "control: the weight's directions", 0.5, loram_reads_no_direction, control=True),
    Check("init-ab", "variances", 0.02, init_ab_has_the_variance),
    Check("init-ab", "control: another variance", 0.1, init_ab_other_variance, control=True),
    Check("gora", "least squares", 1e-10, lambda: gora_is_stationary(True)),
    Check("gora", "control: not fitted", 0.1, lambda: gora_is_stationary(False), control=True),
    Check("gora", "length", 0.02, gora_length),
    *(
        Check("cg-lora", f"dense step, {s}", 1e-8, lambda s=s: cg_lora_is_the_dense_step(s))  # type: ignore[misc]
        for s in ("both", "input", "output")
    ),
    Check("cg-lora", "nearest in the metric", 1e-8, cg_lora_is_nearest_in_the_metric),
    Check("cg-lora", "Natural's direction", 1e-8, cg_lora_is_naturals_direction),
    *(
        Check(
            "cg-lora", f"control: {name}", 0.01, lambda m=m: other_directions_are_farther(m), True
        )  # type: ignore[misc]
        for name, m in (
            ("not whitened", LoraOne()),
            ("inputs alone", CGLoRA("input")),
            ("outputs alone", CGLoRA("output")),
        )
    ),
    *(
        Check("random", f"sizes of {n}", 1e-10, lambda n=n: random_keeps_every_size(n))  # type: ignore[misc]
        for n in METHODS
        if n != "random"
    ),
    Check("random", "control: another direction", 0.5, random_turns_both_factors, control=True),
    Check("random", "control: another seed", 0.5, random_seeds_differ, control=True),
]
