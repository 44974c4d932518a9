"""Each method's own closed-form optimum, against dense float64 algebra, with controls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorainit.methods import (
    EVA,
    QERA,
    CorDA,
    FILet,
    KroneckerQER,
    LoftQ,
    LoraDA,
    LoraGA,
    LoraOne,
    MiLoRA,
    Natural,
    OLoRA,
    PiSSA,
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
    projector,
    relative,
    root,
    solve,
    tail,
    truncated,
)
from tests.methods.optima_peers import PEERS

WEIGHT, STATISTICS = layer()
G, SX, SY = STATISTICS.gradient, STATISTICS.input_second_moment, STATISTICS.output_second_moment
MEAN, Y = STATISTICS.input_mean, STATISTICS.output_second_moment_diagonal


def factors(method: object) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``B`` and ``s B A`` of a method on the one layer used here."""
    found = solve(method, WEIGHT, STATISTICS)
    return found.A, found.B, product(found)


# --- the weight -----------------------------------------------------------------------------


def pissa_is_eckart_young() -> float:
    return excess(float((WEIGHT - factors(PiSSA())[2]).norm()), tail(WEIGHT, RANK))


def pissa_splits_evenly() -> float:
    a, b, _ = factors(PiSSA())
    return relative(b.mT @ b, a @ a.mT)


def other_subspace_is_worse() -> float:
    b = factors(OLoRA())[1]
    return float((WEIGHT - projector(b) @ WEIGHT).norm()) / tail(WEIGHT, RANK) - 1.0


def milora_leaves_the_best_rest() -> float:
    return relative(WEIGHT - factors(MiLoRA())[2], truncated(WEIGHT, OUT - RANK))


def milora_splits_evenly() -> float:
    a, b, _ = factors(MiLoRA())
    return relative(b.mT @ b, a @ a.mT)


def olora_projects_on_first_columns() -> float:
    return relative(factors(OLoRA())[2], SCALING * projector(WEIGHT[:, :RANK]) @ WEIGHT)


def olora_is_a_qr() -> float:
    a, b, _ = factors(OLoRA())
    eye = torch.eye(RANK, dtype=a.dtype)
    return relative(b.mT @ b, eye) + float(a[:, :RANK].tril(-1).norm())


# --- what quantization took -----------------------------------------------------------------

E = STATISTICS.weight_error
assert E is not None
SX_ROOT, SY_ROOT = root(damped(SX, 0.01), 0.5), root(damped(SY, 0.01), 0.5)
DIAGONAL_ROOT = SX.diagonal().sqrt().diag()
OUT_EYE, IN_EYE = torch.eye(OUT, dtype=E.dtype), torch.eye(IN, dtype=E.dtype)
QUANTIZED: tuple[tuple[str, object, Tensor, Tensor], ...] = (
    ("loftq", LoftQ(), OUT_EYE, IN_EYE),
    ("qera", QERA(), OUT_EYE, SX_ROOT),
    ("qera", QERA("diagonal"), OUT_EYE, DIAGONAL_ROOT),
    ("kronecker-qer", KroneckerQER(), SY_ROOT, SX_ROOT),
)
"""Methods, with symmetric roots on both sides of the error that each makes least."""


def left_over(method: object, left: Tensor, right: Tensor) -> float:
    """What stays of the quantization error in a metric, over the least that any matrix of the rank leaves."""
    rest = left @ (E - factors(method)[2]) @ right
    return float(rest.norm()) / tail(left @ E @ right, RANK)


def full_rank_leaves_nothing(method: object) -> float:
    return relative(product(solve(method, WEIGHT, STATISTICS, OUT)), E)


def balanced_terms(method: object) -> float:
    a, b, _ = factors(method)
    return relative(a.norm(dim=1), b.norm(dim=0))


# --- the inputs -----------------------------------------------------------------------------


def captured(a: Tensor, covariance: Tensor) -> float:
    """Share of the variance inside the row space of ``A``."""
    return float((projector(a.mT) @ covariance).trace() / covariance.trace())


COVARIANCE = SX - torch.outer(MEAN, MEAN)


def eva_captures_most(centered: bool) -> float:
    covariance = COVARIANCE if centered else SX
    most = float(torch.linalg.eigvalsh(covariance)[-RANK:].sum() / covariance.trace())
    return excess(captured(factors(EVA(centered=centered))[0], covariance), most)


def eva_other_centring_captures_less() -> float:
    right = captured(factors(EVA(centered=True))[0], COVARIANCE)
    return right - captured(factors(EVA(centered=False))[0], COVARIANCE)


def eva_explains_variance() -> float:
    values = torch.linalg.eigvalsh(COVARIANCE).flip(0)
    found = EVA().explained_variance(STATISTICS, 2 * RANK)
    return relative(found, (values / values.sum())[: 2 * RANK])


CONTEXT = damped(SX, 0.01)


def weighted(change: Tensor) -> float:
    return float((change @ CONTEXT).norm())


def corda_ipm_is_weighted_eckart_young() -> float:
    found = weighted(WEIGHT - factors(CorDA())[2])
    return excess(found, tail(WEIGHT @ CONTEXT, RANK))


def corda_unweighted_is_worse() -> float:
    return weighted(WEIGHT - factors(PiSSA())[2]) / tail(WEIGHT @ CONTEXT, RANK) - 1.0


def corda_kpm_keeps_the_rest() -> float:
    rest = WEIGHT - factors(CorDA(mode="kpm"))[2]
    return relative(rest @ CONTEXT, truncated(WEIGHT @ CONTEXT, OUT - RANK))


def corda_balances() -> float:
    a, b, _ = factors(CorDA())
    return relative(a.norm(dim=1), b.norm(dim=0))


# --- the gradient ---------------------------------------------------------------------------


def first_step(a: Tensor, b: Tensor) -> Tensor:
    """What one gradient step moves the product by: ``B B^T G + G A^T A``, at norm one factors."""
    return b @ b.mT @ G + G @ a.mT @ a


def lora_ga_step_is_best(direction: str) -> float:
    a, b, _ = factors(LoraGA(direction=direction, scale="unit"))  # type: ignore[arg-type]
    return excess(float((first_step(a, b) - G).norm()), tail(G, 2 * RANK))


def lora_ga_same_triplets_are_worse() -> float:
    u, _, vh = torch.linalg.svd(G, full_matrices=False)
    error = (first_step(vh[:RANK], u[:, :RANK]) / 1.0 - G).norm()
    return float(error) / tail(G, 2 * RANK) - 1.0


def lora_one_is_one_step() -> float:
    first = float(torch.linalg.svdvals(G)[0])
    return relative(factors(LoraOne())[2], -SCALING * truncated(G, RANK) / (128.0 * first))


def lora_one_output_scale() -> float:
    plain, scaled = factors(LoraOne())[2], factors(LoraOne(output_scale=True))[2]
    return relative(scaled, plain * math.sqrt(OUT))


# --- the Fisher factors ---------------------------------------------------------------------

X_DAMPED, Y_DAMPED = damped(SX, Natural().damping), damped(SY, Natural().damping)


def quadratic(step: Tensor) -> float:
    """The model that a natural step minimises: ``<G, D> + |Y^(1/2) D X^(1/2)|^2 / 2``."""
    return float((G * step).sum() + 0.5 * (step * (Y_DAMPED @ step @ X_DAMPED)).sum())


def dense_natural(rank: int) -> Tensor:
    """The rank-r step by symmetric roots: another root than the one in the package."""
    x, y = root(X_DAMPED, -0.5), root(Y_DAMPED, -0.5)
    return y @ truncated(-y @ G @ x, rank) @ x


def natural_is_the_dense_step() -> float:
    return relative(factors(Natural())[2], dense_natural(RANK))


def natural_full_rank_is_the_solve() -> float:
    full = -torch.linalg.solve(Y_DAMPED, torch.linalg.solve(X_DAMPED, G.mT).mT)
    return relative(product(solve(Natural(), WEIGHT, STATISTICS, OUT)), full)


def natural_decrease_is_half_the_squares() -> float:
    values = Natural().singular_values(STATISTICS, RANK)
    return excess(-quadratic(factors(Natural())[2]), float(values.square().sum()) / 2)


def natural_is_stationary() -> float:
    """No change of either factor lowers the model: its gradient by autograd, relative to G's."""
    found = solve(Natural(), WEIGHT, STATISTICS)
    a, b = found.A.clone().requires_grad_(), found.B.clone().requires_grad_()
    step = SCALING * b @ a
    model = (G * step).sum() + 0.5 * (step * (Y_DAMPED @ step @ X_DAMPED)).sum()
    slope = torch.autograd.grad(model, (a, b))
    start = torch.autograd.grad((G * (SCALING * b @ a)).sum(), (a, b))
    return max(float(s.norm() / g.norm()) for s, g in zip(slope, start, strict=True))


def natural_euclidean_cut_is_worse() -> float:
    """How much of the possible decrease a cut in the Euclidean norm loses, at its best length."""
    cut = truncated(dense_natural(OUT), RANK)
    slope, bend = float((G * cut).sum()), float((cut * (Y_DAMPED @ cut @ X_DAMPED)).sum())
    best = -(slope**2) / (2 * bend)
    return 1.0 - best / quadratic(factors(Natural())[2])


def natural_rows() -> float:
    """Orthogonal rows of one activation, the one asked for; orthogonal columns."""
    a, b, _ = factors(Natural(activation=1e5, damping=1e-12))
    size = SX.diagonal().mean() / 3 * 1e10
    # A row's length has eight binary digits.
    parts = [max(0.0, relative((a @ SX @ a.mT).diagonal(), size.expand(len(a))) - 2**-7)]
    for gram in (a @ a.mT, b.mT @ b):
        parts.append(relative(gram, torch.diag(gram.diagonal())))
    return sum(parts)


def natural_first_steps(size: float) -> Tensor:
    """How far one Adam step moves the predictions, by each row and column, with rows `size` as long.

    In the undamped Fisher metric ``tr(Sy D Sx D^T)``, written out; `size` 1 is the package's.
    """
    a, b, _ = factors(Natural(activation=1e-9, damping=1e-12))
    a, b = a * size, b / size
    parts = []
    for row, column in zip(a, b.mT, strict=True):
        by_b = SCALING * torch.outer((G @ row).sign(), row)
        by_a = SCALING * torch.outer(column, (column @ G).sign())
        parts.append(sum((SY * (step @ SX @ step.mT)).sum() for step in (by_b, by_a)))
    return torch.stack(parts)


def natural_rows_are_balanced() -> float:
    """The share of the first steps that rows a little longer or shorter would save."""
    least = torch.minimum(natural_first_steps(1.01), natural_first_steps(1 / 1.01))
    return float((natural_first_steps(1.0) / least - 1).max().clamp_min(0))


def natural_rows_twice_as_long() -> float:
    return float((natural_first_steps(2.0) / natural_first_steps(1.0) - 1).min())


def natural_length() -> float:
    return relative(factors(Natural(length=0.1))[2], 0.1 * factors(Natural())[2])


def dense_lora_da(method: LoraDA, variance: bool = True) -> tuple[Tensor, Tensor]:
    """Subspace and ``B A`` of LoRA-DA's formula, with explicit inverses."""
    if method.damping_mode == "absolute":
        z, y = SX + method.damping * torch.eye(IN, dtype=SX.dtype), Y + method.damping
    else:
        z, y = damped(SX, method.damping), Y + method.damping * Y.mean()
    inverse = torch.linalg.inv(z)
    change = -inverse @ G.mT @ torch.diag(1 / y)
    sigma = torch.linalg.svdvals(change)[0]
    change = change / sigma
    omega = -method.bias_weight * change @ change.mT
    if variance:
        population = method.population or 500.0
        omega = omega + method.beta * (1 / y).sum() / (population * sigma**2) * inverse
    vectors = torch.linalg.eigh(omega)[1][:, :RANK]
    return vectors, (change.mT @ vectors @ vectors.mT) / method.gamma


LORA_DA = (
    ("defaults", LoraDA()),
    ("strong variance", LoraDA(beta=30.0, population=5.0)),
    ("paper", LoraDA.paper()),
    ("no variance", LoraDA(beta=0.0)),
)


def lora_da_is_the_formula(method: LoraDA) -> float:
    found = factors(method)
    vectors, change = dense_lora_da(method)
    return angle(found[0].mT, vectors) + relative(found[2], SCALING * change)


def lora_da_needs_its_variance() -> float:
    method = LORA_DA[1][1]
    return angle(factors(method)[0].mT, dense_lora_da(method, variance=False)[0])


def filet_is_the_formula(method: FILet) -> float:
    """Energies candidate by candidate, in a loop; the published scale."""
    if method.candidates == "gram":
        v = (WEIGHT.mT @ WEIGHT).mT
        v = [column / column.norm() for column in v]
    else:
        v = list(torch.linalg.svd(WEIGHT, full_matrices=False)[2])
    terms = []
    for direction in v:
        u = WEIGHT @ direction / (WEIGHT @ direction).norm()
        energy = float((direction @ SX @ direction) * (u @ SY @ u))
        terms.append((energy, torch.outer(u, direction)))
    terms.sort(key=lambda term: term[0], reverse=method.select == "highest")
    wanted = sum(max(energy, 1e-8) * term for energy, term in terms[:RANK])
    assert isinstance(wanted, Tensor)
    return relative(factors(method)[2], wanted)


def filet_other_end_differs() -> float:
    lowest, highest = FILet(scale_floor=1e-8), FILet(scale_floor=1e-8, select="highest")
    return relative(factors(highest)[2], factors(lowest)[2])


CHECKS = [
    Check("pissa", "Eckart-Young", 1e-10, pissa_is_eckart_young),
    Check("pissa", "even split", 1e-10, pissa_splits_evenly),
    Check("pissa", "control: another subspace", 0.05, other_subspace_is_worse, control=True),
    Check("milora", "leaves the best rest", 1e-10, milora_leaves_the_best_rest),
    Check("milora", "even split", 1e-10, milora_splits_evenly),
    Check("olora", "projection on first columns", 1e-10, olora_projects_on_first_columns),
    Check("olora", "orthonormal B, triangular A", 1e-10, olora_is_a_qr),
    *(
        Check(
            n, f"least error in its metric, {m}", 1e-8, lambda m=m, y=y, x=x: left_over(m, y, x) - 1
        )  # type: ignore[misc]
        for n, m, y, x in QUANTIZED
    ),
    *(
        Check(
            n,
            f"control: {m} in the metric of {other}",
            1e-2,
            lambda m=m, y=y, x=x: left_over(m, y, x) - 1,
            control=True,
        )  # type: ignore[misc]
        for n, m, *_ in QUANTIZED
        for _, other, y, x in QUANTIZED
        if m != other
    ),
    *(
        Check(n, f"full rank leaves nothing, {m}", 1e-8, lambda m=m: full_rank_leaves_nothing(m))  # type: ignore[misc]
        for n, m, *_ in QUANTIZED
    ),
    *(
        Check(n, f"terms of equal norms, {m}", 1e-10, lambda m=m: balanced_terms(m))  # type: ignore[misc]
        for n, m, *_ in QUANTIZED
    ),
    Check("eva", "most variance, centred", 1e-10, lambda: eva_captures_most(True)),
    Check("eva", "most variance, uncentred", 1e-10, lambda: eva_captures_most(False)),
    Check("eva", "explained variance", 1e-10, eva_explains_variance),
    Check("eva", "control: other centring", 1e-3, eva_other_centring_captures_less, control=True),
    Check("corda", "weighted Eckart-Young (ipm)", 1e-10, corda_ipm_is_weighted_eckart_young),
    Check("corda", "keeps the rest (kpm)", 1e-10, corda_kpm_keeps_the_rest),
    Check("corda", "factors of equal norm", 1e-10, corda_balances),
    Check("corda", "control: unweighted cut", 0.05, corda_unweighted_is_worse, control=True),
    *(
        Check("lora-ga", f"best first step, {d}", 1e-10, lambda d=d: lora_ga_step_is_best(d))  # type: ignore[misc]
        for d in ("ArB2r", "A2rBr", "ArBr", "random")
    ),
    Check("lora-ga", "control: same triplets", 0.05, lora_ga_same_triplets_are_worse, control=True),
    Check("lora-one", "one best step", 1e-10, lora_one_is_one_step),
    Check("lora-one", "output scale", 1e-10, lora_one_output_scale),
    Check("natural", "dense step, other roots", 1e-8, natural_is_the_dense_step),
    Check("natural", "full rank = dense solve", 1e-8, natural_full_rank_is_the_solve),
    Check("natural", "promised decrease", 1e-8, natural_decrease_is_half_the_squares),
    Check("natural", "stationary (autograd)", 1e-8, natural_is_stationary),
    Check("natural", "orthogonal rows and columns", 1e-8, natural_rows),
    # Lengths are rounded, by 2^-8 at most; near its least ``c^2 + c^-2`` rises by twice the square of that.
    Check("natural", "rows move what columns move", 2**-15, natural_rows_are_balanced),
    Check("natural", "control: longer rows", 0.5, natural_rows_twice_as_long, control=True),
    Check("natural", "length", 1e-10, natural_length),
    Check("natural", "control: Euclidean cut", 0.02, natural_euclidean_cut_is_worse, control=True),
    *(
        Check("lora-da", f"dense formula, {name}", 1e-8, lambda m=m: lora_da_is_the_formula(m))  # type: ignore[misc]
        for name, m in LORA_DA
    ),
    Check("lora-da", "control: no variance", 1e-2, lora_da_needs_its_variance, control=True),
    *(
        Check(
            "filet",
            f"dense formula, {candidates}, {select}",
            1e-10,
            lambda c=candidates, s=select: filet_is_the_formula(FILet(c, s, 1e-8)),  # type: ignore[misc]
        )
        for candidates in ("gram", "svd")
        for select in ("lowest", "highest")
    ),
    Check("filet", "control: the other end", 0.5, filet_other_end_differs, control=True),
    *PEERS,
]
