"""Every method against its reference: PEFT's code where that follows the paper, else the paper.

PEFT 0.21's LoRA-GA and CorDA do not follow their papers: checks here say in what, so that a change
in PEFT is noticed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.config import CordaConfig
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

import lorainit
from lorainit.methods import (
    EVA,
    QERA,
    CorDA,
    Gaussian,
    LoftQ,
    LoraGA,
    LoraOne,
    OLoRA,
    Orthogonal,
    PiSSA,
    Vanilla,
)
from lorainit.types import Factors, LayerStatistics
from tests.methods.common import (
    IN,
    OUT,
    RANK,
    SCALING,
    Check,
    angle,
    damped,
    layer,
    product,
    relative,
    solve,
)
from tests.methods.references_peers import PEERS

WEIGHT, STATISTICS = layer(dtype=torch.float32)
GRADIENT = STATISTICS.gradient
# A spectrum that decays: PEFT's incremental PCA is a randomized one, near enough only with gaps.
INPUTS = torch.randn(40, IN, generator=torch.Generator().manual_seed(3)) * 0.5 ** torch.arange(IN)
INPUTS = INPUTS + torch.linspace(-1, 1, IN)


class OneLayer(nn.Module):
    """The smallest model that PEFT can wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(IN, OUT, bias=False)
        self.lin.weight.data = WEIGHT.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def config(init: object, rank: int = RANK, **settings: object) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=round(SCALING * rank),
        target_modules=["lin"],
        init_lora_weights=init,
        **settings,
    )


def peft_factors(init: object, model: OneLayer | None = None, **settings: object) -> Factors:
    """What PEFT writes into a layer."""
    torch.manual_seed(0)
    wrapped = get_peft_model(model or OneLayer(), config(init, **settings))
    found = wrapped.base_model.model.lin
    return Factors(found.lora_A["default"].weight.data, found.lora_B["default"].weight.data)


def same_as_peft(method: object, init: str) -> float:
    """Both factors up to signs of the rank's directions, and ``s B A``."""
    ours, theirs = solve(method, WEIGHT, STATISTICS), peft_factors(init)
    return max(
        relative(product(ours), product(theirs)),
        relative(ours.A.abs(), theirs.A.abs()),
        relative(ours.B.abs(), theirs.B.abs()),
    )


def pissa_base_is_ours() -> float:
    """PEFT moves the base by what we anchor."""
    wrapped = get_peft_model(OneLayer(), config("pissa"))
    moved = wrapped.base_model.model.lin.base_layer.weight.data
    return relative(WEIGHT - moved, product(solve(PiSSA(), WEIGHT, STATISTICS)))


@contextmanager
def plain_linear() -> Iterator[list[Tensor]]:
    """Record what kaiming_uniform_ and normal_ write while PEFT builds a layer."""
    written: list[Tensor] = []
    kept = nn.init.kaiming_uniform_, nn.init.normal_

    def record(fill):  # type: ignore[no-untyped-def]
        def call(tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
            torch.manual_seed(0)
            out = fill(tensor, *args, **kwargs)
            written.append(out)
            return out

        return call

    nn.init.kaiming_uniform_, nn.init.normal_ = record(kept[0]), record(kept[1])
    try:
        yield written
    finally:
        nn.init.kaiming_uniform_, nn.init.normal_ = kept


def drawn_as_peft(method: object, init: object) -> float:
    """The same draw from the same generator state."""
    with plain_linear():
        theirs = peft_factors(init)
    ours = solve(method, WEIGHT, STATISTICS)
    return relative(ours.A, theirs.A) + relative(ours.B, theirs.B)


def vanilla_twice_as_long() -> float:
    """Through the whole start: by how much the rows of A miss twice a default's length."""
    model, longer = OneLayer(), config(True)
    wrapped = lorainit.get_peft_model(model, longer, method=Vanilla(size=2.0), progress=False)
    found = wrapped.base_model.model.lin
    a, b = (getattr(found, n)["default"].weight.detach() for n in ("lora_A", "lora_B"))
    assert not b.any()
    bound = 2 / a.shape[1] ** 0.5
    assert float(a.abs().max()) <= bound
    # The root mean square of a uniform draw is its bound over the root of three.
    return abs(float(a.square().mean().sqrt()) * 3**0.5 / bound - 1)


def orthogonal_is_pefts() -> float:
    with plain_linear():
        model = OneLayer()
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config(True))
    found = wrapped.base_model.model.lin
    torch.manual_seed(0)
    found.orthogonal_init("default")
    theirs = Factors(found.lora_A["default"].weight.data, found.lora_B["default"].weight.data)
    ours = solve(Orthogonal(), WEIGHT, STATISTICS)
    return relative(ours.A, theirs.A) + relative(ours.B, theirs.B)


# --- EVA ------------------------------------------------------------------------------------


def inputs_statistics(x: Tensor) -> LayerStatistics:
    return LayerStatistics(input_second_moment_sum=x.mT @ x, input_sum=x.sum(0), positions=len(x))


def eva_is_pefts(centered: bool) -> float:
    """Row space of ``A`` after PEFT's own initialization on one batch, and ``B A``."""
    model = OneLayer()
    peft_model = get_peft_model(model, config("eva", eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(
        peft_model,
        [{"x": INPUTS}],
        forward_fn=lambda model, inputs: model(**inputs),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    found = peft_model.base_model.model.lin
    theirs = Factors(found.lora_A["default"].weight.data, found.lora_B["default"].weight.data)
    ours = solve(EVA(centered=centered), WEIGHT, inputs_statistics(INPUTS))
    return angle(ours.A.mT, theirs.A.mT) + relative(product(ours), product(theirs))


def eva_ratios_are_pefts() -> float:
    pca = IncrementalPCA(n_components=RANK).partial_fit(INPUTS.clone())
    found = EVA().explained_variance(inputs_statistics(INPUTS), RANK)
    return relative(found, pca.explained_variance_ratio_)


# --- CorDA ----------------------------------------------------------------------------------


def corda_formula(mode: str) -> float:
    """``U S V^T C^-1 / s`` with an explicit inverse, and the release's split of the factors."""
    weight, statistics = layer()
    context = damped(statistics.input_second_moment, 0.01)
    u, s, vh = torch.linalg.svd(weight @ context, full_matrices=False)
    kept = slice(0, RANK) if mode == "ipm" else slice(-RANK, None)
    u, s, back = u[:, kept], s[kept] / SCALING, vh[kept] @ torch.linalg.inv(context)
    found = solve(CorDA(mode=mode, balanced=False), weight, statistics)  # type: ignore[arg-type]
    return max(
        relative(product(found), SCALING * (u * s) @ back),
        relative(found.A.abs(), (s.sqrt()[:, None] * back).abs()),
        relative(found.B.abs(), (u * s.sqrt()).abs()),
    )


def corda_module() -> Any:
    """PEFT's CorDA imports attrs for one decorator, which PEFT does not install: dataclasses do."""
    try:
        return importlib.import_module("peft.tuners.lora.corda")
    except ModuleNotFoundError:
        stand_in = types.ModuleType("attr")
        stand_in.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
        with patch.dict(sys.modules, {"attr": stand_in}):
            return importlib.import_module("peft.tuners.lora.corda")


def peft_corda() -> tuple[Factors, Tensor]:
    """PEFT's factors from two sequences, fed one by one, and the moment that it sums up."""
    preprocess_corda = corda_module().preprocess_corda
    model = OneLayer()
    settings = config("corda", corda_config=CordaConfig(corda_method="ipm"))
    sequences = INPUTS[:10], 3.0 * INPUTS[10:]

    def run() -> None:
        for sequence in sequences:
            model(sequence[None])

    preprocess_corda(model, settings, run_model=run)
    torch.manual_seed(0)
    found = get_peft_model(model, settings).base_model.model.lin
    factors = Factors(found.lora_A["default"].weight.data, found.lora_B["default"].weight.data)
    scaled = [x / x.max().abs() for x in sequences]
    return factors, sum((x.mT @ x for x in scaled), torch.zeros(IN, IN)) / len(sequences)


def corda_is_pefts_given_its_moment() -> float:
    theirs, moment = peft_corda()
    statistics = LayerStatistics.from_means(input_second_moment=moment)
    ours = solve(CorDA.paper(), WEIGHT, statistics)
    return max(relative(product(ours), product(theirs)), relative(ours.A.abs(), theirs.A.abs()))


def corda_pefts_moment_is_another() -> float:
    """Dividing every call by its maximum, and by calls instead of tokens, is not the mean."""
    theirs, _ = peft_corda()
    ours = solve(CorDA(), WEIGHT, inputs_statistics(torch.cat([INPUTS[:10], 3.0 * INPUTS[10:]])))
    return relative(product(ours), product(theirs))


# --- LoRA-GA and LoRA-One -------------------------------------------------------------------


def lora_ga_triplets(direction: str) -> tuple[list[int], list[int]]:
    """Triplets of A and of B, as the paper and the release number them, from zero."""
    first, second = list(range(RANK)), list(range(RANK, 2 * RANK))
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    return list(range(1, 2 * RANK, 2)), list(range(0, 2 * RANK, 2))


def lora_ga_formula(direction: str, scale: str) -> float:
    """Every direction and scale; single directions are compared up to sign, as projectors."""
    weight, statistics = layer()
    u, _, vh = torch.linalg.svd(statistics.gradient, full_matrices=False)
    for_a, for_b = lora_ga_triplets(direction)
    top = torch.linalg.svdvals(weight)[:RANK]
    size = {
        "stable": OUT**0.25 / math.sqrt(16),
        "gd": 1 / SCALING,
        "unit": 1.0,
        "weightS": float((top / SCALING).sqrt().mean()),
    }[scale]
    found = solve(LoraGA(direction=direction, scale=scale), weight, statistics)  # type: ignore[arg-type]
    return max(
        relative(found.A.abs(), (size * vh[for_a]).abs()),
        relative(found.B.abs(), (size * u[:, for_b]).abs()),
    )


def lora_ga_random_sets() -> float:
    """Overlap of the two random sets (none), and the span of both (all ``2r`` triplets)."""
    weight, statistics = layer()
    u, _, vh = torch.linalg.svd(statistics.gradient, full_matrices=False)
    found = solve(LoraGA(direction="random", scale="unit", seed=5), weight, statistics)
    in_a = (vh[: 2 * RANK] @ found.A.mT).square().sum(1)
    in_b = (u[:, : 2 * RANK].mT @ found.B).square().sum(1)
    ones = torch.ones(2 * RANK, dtype=in_a.dtype)
    return relative(in_a + in_b, ones) + float((in_a * in_b).norm())


def peft_lora_ga() -> Factors:
    model = OneLayer()
    model.lin._peft_loraga_grad = GRADIENT.clone()  # type: ignore[assignment]
    return peft_factors("lora_ga", model, lora_ga_config=LoraGAConfig())


def lora_ga_of_peft_is_another() -> float:
    return relative(
        product(solve(LoraGA(), WEIGHT, STATISTICS)).abs(), product(peft_lora_ga()).abs()
    )


def lora_ga_of_peft_in_what() -> float:
    """PEFT's: A at norm one, B times the singular values and the stable scale, once."""
    theirs = peft_lora_ga()
    u, s, vh = torch.linalg.svd(GRADIENT.double(), full_matrices=False)
    scaled = u[:, RANK : 2 * RANK] * s[RANK : 2 * RANK] * OUT**0.25 / 4.0
    return max(relative(theirs.A.abs(), vh[:RANK].abs()), relative(theirs.B.abs(), scaled.abs()))


def lora_one_formula() -> float:
    weight, statistics = layer()
    u, s, vh = torch.linalg.svd(-statistics.gradient, full_matrices=False)
    share = (s[:RANK] / s[0] / 128.0).sqrt()
    found = solve(LoraOne(), weight, statistics)
    return max(
        relative(found.A.abs(), (share[:, None] * vh[:RANK]).abs()),
        relative(found.B.abs(), (u[:, :RANK] * share).abs()),
        relative(product(found), SCALING * (u[:, :RANK] * share.square()) @ vh[:RANK]),
    )


# --- quantized bases ------------------------------------------------------------------------


def loftq_is_pefts() -> float:
    """PEFT's decomposition of the same error, at ``s`` = 1, where it does not matter that PEFT leaves s in."""
    assert STATISTICS.weight_error is not None
    found = solve(LoftQ(), WEIGHT, STATISTICS, scaling=1.0)
    parts = _low_rank_decomposition(STATISTICS.weight_error, reduced_rank=RANK)
    return relative(product(found, 1.0), parts["L"] @ parts["R"]) + relative(
        found.A.norm(dim=1), parts["R"].norm(dim=1)
    )


def loftq_of_peft_keeps_the_scaling(divided: bool) -> float:
    """At another ``s`` PEFT's factors, in a layer that multiplies by it, are ``s`` times too long."""
    assert STATISTICS.weight_error is not None
    parts = _low_rank_decomposition(STATISTICS.weight_error, reduced_rank=RANK)
    theirs = SCALING * parts["L"] @ parts["R"]
    ours = product(solve(LoftQ(), WEIGHT, STATISTICS))
    return relative(theirs / SCALING if divided else theirs, ours)


def qera_formula(form: str) -> float:
    """Theorems 1 and 2 as written, on the transposed layer ``y = x W``, with its root and its inverse."""
    weight, statistics = layer()
    assert statistics.weight_error is not None
    moment = damped(statistics.input_second_moment, 0.01)
    if form == "exact":
        values, vectors = torch.linalg.eigh(moment)
        scale = vectors @ torch.diag(values.sqrt()) @ vectors.T
    else:
        scale = torch.diag(statistics.input_second_moment.diagonal().sqrt())
    u, s, vh = torch.linalg.svd(scale @ statistics.weight_error.T, full_matrices=False)
    a = torch.linalg.inv(scale) @ u[:, :RANK]
    b = torch.diag(s[:RANK]) @ vh[:RANK]
    found = solve(QERA(form), weight, statistics)  # type: ignore[arg-type]
    return relative(product(found), (a @ b).T)


def qera_splits_as_the_paper() -> float:
    """``B`` orthonormal, as ``V`` of the transposed layer."""
    b = solve(QERA.paper(), *layer()).B
    return relative(b.mT @ b, torch.eye(RANK, dtype=b.dtype))


CHECKS = [
    Check("vanilla", "PEFT's draw", 1e-6, lambda: drawn_as_peft(Vanilla(), True)),
    Check("vanilla", "twice as long", 0.15, vanilla_twice_as_long),
    Check("gaussian", "PEFT's draw", 1e-6, lambda: drawn_as_peft(Gaussian(), "gaussian")),
    Check("orthogonal", "PEFT's draw", 1e-6, orthogonal_is_pefts),
    # PEFT's SVD is in float32: its rounding differs between processors.
    Check("pissa", "PEFT's factors", 3e-5, lambda: same_as_peft(PiSSA(), "pissa")),
    Check("pissa", "PEFT's shift of the base", 1e-5, pissa_base_is_ours),
    Check("olora", "PEFT's factors", 1e-5, lambda: same_as_peft(OLoRA(), "olora")),
    Check("eva", "PEFT's subspace and B A", 1e-4, lambda: eva_is_pefts(True)),
    Check("eva", "PEFT's explained variance", 1e-5, eva_ratios_are_pefts),
    Check("eva", "control: PEFT centres", 1e-2, lambda: eva_is_pefts(False), control=True),
    Check("corda", "paper's formula, ipm", 1e-9, lambda: corda_formula("ipm")),
    Check("corda", "paper's formula, kpm", 1e-9, lambda: corda_formula("kpm")),
    Check("corda", "PEFT's factors from its moment", 1e-4, corda_is_pefts_given_its_moment),
    Check("corda", "PEFT's moment is another", 1e-2, corda_pefts_moment_is_another, control=True),
    Check("loftq", "PEFT's factors", 1e-5, loftq_is_pefts),
    Check("loftq", "PEFT's, s divided out", 1e-5, lambda: loftq_of_peft_keeps_the_scaling(True)),
    Check(
        "loftq", "PEFT's keep s", 0.9, lambda: loftq_of_peft_keeps_the_scaling(False), control=True
    ),
    Check("qera", "theorem 1", 1e-9, lambda: qera_formula("exact")),
    Check("qera", "theorem 2", 1e-9, lambda: qera_formula("diagonal")),
    Check("qera", "the paper's split", 1e-9, qera_splits_as_the_paper),
    *(
        Check(
            "lora-ga",
            f"release's formula, {direction}, {scale}",
            1e-10,
            lambda d=direction, s=scale: lora_ga_formula(d, s),  # type: ignore[misc]
        )
        for direction in ("ArB2r", "A2rBr", "ArBr")
        for scale in ("stable", "gd", "unit", "weightS")
    ),
    Check("lora-ga", "random sets are disjoint", 1e-10, lora_ga_random_sets),
    Check("lora-ga", "PEFT's is another formula", 0.1, lora_ga_of_peft_is_another, control=True),
    Check("lora-ga", "PEFT's formula, as documented", 1e-4, lora_ga_of_peft_in_what),
    Check("lora-one", "paper's formula", 1e-10, lora_one_formula),
    *PEERS,
]
