"""LoRA-DA and FILet with their papers' settings against their codes' formulas, term by term.

Golden tensors of LoRA-DA's code are in ``tests/test_golden.py``; its options that the published run
leaves off are here against the same formulas, written out with explicit inverses.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import lorainit
from lorainit import LoraDA
from lorainit.methods import FILet
from lorainit.types import LayerStatistics
from tests.adapters import tiny
from tests.methods.common import IN, OUT, RANK, angle, layer, projector, relative, solve

# --- LoRA-DA --------------------------------------------------------------------------------

POPULATION = 2000.0
PAPER = LoraDA.paper(population=POPULATION)
OPTIONS = {
    "published": PAPER,
    "median damping": replace(PAPER, output_damping=0.5),
    "variance rescaled": replace(PAPER, rescale_variance=True),
    "balanced": replace(PAPER, balance=True),
    "all": replace(PAPER, output_damping=0.5, rescale_variance=True, balance=True),
}
# More outputs than inputs, and the reverse; a dimension with a lower and an upper median.
SHAPES = {"wide": (OUT, IN), "tall": (IN, OUT)}


@dataclasses.dataclass
class Release:
    """The terms of the release's function, by their names there, for one layer."""

    z_fisher: Tensor
    y_inverse_diag: Tensor
    delta_w: Tensor
    sigma_max: float
    variance_coefficient: float
    guidance: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def of(cls, statistics: LayerStatistics, method: LoraDA) -> Release:
        z = statistics.input_second_moment
        z = z + 1e-6 * torch.eye(len(z), dtype=z.dtype)
        y = statistics.output_second_moment_diagonal
        damping = 1e-6
        if method.output_damping is not None:
            ordered = y.sort().values
            damping = method.output_damping * float(ordered[(len(y) - 1) // 2])
        y_inverse = 1 / (y + damping)
        delta = -torch.linalg.inv(z) @ statistics.gradient.mT @ torch.diag(y_inverse)
        sigma = float(torch.linalg.svdvals(delta)[0])
        delta = delta / sigma
        bias = -1.0 * delta @ delta.mT
        coefficient = float(y_inverse.sum()) / POPULATION / sigma**2
        if method.rescale_variance:
            norm = abs(coefficient) * torch.linalg.inv(z).norm()
            coefficient *= float(bias.norm() / norm)
        guidance = bias + 0.03 * coefficient * torch.linalg.inv(z)
        a0 = torch.linalg.eigh(guidance)[1][:, :RANK]
        a, b = a0.mT, delta.mT @ a0
        if method.balance:
            u, s, vh = torch.linalg.svd(b, full_matrices=False)
            a, b = torch.diag(s.sqrt()) @ vh @ a, u @ torch.diag(s.sqrt())
        scale = 1024.0**0.5
        return cls(z, y_inverse, delta, sigma, coefficient, guidance, a / scale, b / scale)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", OPTIONS.values(), ids=OPTIONS)
def test_lora_da_term_by_term(method: LoraDA, shape: tuple[int, int]) -> None:
    weight, statistics = layer(out=shape[0], inner=shape[1])
    release = Release.of(statistics, method)
    fisher = method._fisher(statistics)
    assert relative(fisher.z_factor @ fisher.z_factor.mT, release.z_fisher) < 1e-10
    assert relative(fisher.y_inverse, release.y_inverse_diag) < 1e-10
    assert relative(fisher.change() / release.sigma_max, release.delta_w) < 1e-8
    weighed = float(fisher.variance) / release.sigma_max**2
    assert weighed == pytest.approx(0.03 * release.variance_coefficient, rel=1e-8)
    found = solve(method, weight, statistics)
    assert angle(found.A.mT, release.lora_a.mT) < 1e-7
    assert relative(found.B @ found.A, release.lora_b @ release.lora_a) < 1e-8
    # Sizes, whatever turn a row and its column share.
    assert relative(values(found.A), values(release.lora_a)) < 1e-8
    assert relative(values(found.B), values(release.lora_b)) < 1e-8
    if method.balance:
        assert relative(found.A @ found.A.mT, found.B.mT @ found.B) < 1e-8


def values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("name", ["median damping", "variance rescaled", "balanced"])
def test_each_option_is_another_start(name: str) -> None:
    """Control: what is compared above would notice an option that does nothing."""
    weight, statistics = layer()
    plain, other = (solve(OPTIONS[n], weight, statistics) for n in ("published", name))
    product = relative(other.B @ other.A, plain.B @ plain.A)
    sizes = relative(values(other.A), values(plain.A))
    assert max(product, sizes) > 1e-2


def test_no_option_in_the_published_settings() -> None:
    assert LoraDA.paper() == LoraDA(damping=1e-6, damping_mode="absolute")
    assert LoraDA.paper(population=5.0) == replace(LoraDA.paper(), population=5.0)
    off = (PAPER.output_damping, PAPER.rescale_variance, PAPER.balance)
    assert off == (None, False, False)


@pytest.mark.parametrize("known", [256.0, None], ids=["length of a list", "sequences counted"])
def test_a_sample_in_place_of_the_training_set_is_said(
    known: float | None,
) -> None:
    """And the variance term is as much heavier as the sample is smaller."""
    _, statistics = layer()
    statistics = replace(statistics, population=known, sequences=256.0)
    said = LoraDA.paper().doubt(statistics)
    assert said is not None
    assert "taken to be 256" in said
    assert "391 times heavier" in said
    heavy = LoraDA.paper()._fisher(statistics).variance
    light = LoraDA.paper(population=100_000.0)._fisher(statistics).variance
    assert float(heavy / light) == pytest.approx(100_000 / 256)


@pytest.mark.parametrize(
    ("method", "number"),
    [
        (LoraDA.paper(population=100_000.0), 256.0),
        (LoraDA.paper(), 5000.0),
        (LoraDA(beta=0.0), 256.0),
        (LoraDA(rescale_variance=True), 256.0),
    ],
    ids=["said", "a training set's length", "no variance term", "no population in it"],
)
def test_nothing_is_said_where_nothing_is_wrong(method: LoraDA, number: float) -> None:
    _, statistics = layer()
    assert method.doubt(replace(statistics, population=number)) is None


def test_a_doubt_is_said_once_and_of_starts_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Solving for a look at the factors says nothing."""
    from lorainit.solve.layers import _warn_once

    weight, statistics = layer()
    assert LoraDA().doubt(replace(statistics, population=8.0)) is not None
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lorainit"):
        LoraDA().solve(weight, replace(statistics, population=8.0), RANK, 1.0)
        assert not caplog.records
        for _ in range(2):
            lorainit.get_peft_model(
                tiny.llama(), tiny.config(), method=LoraDA(), data=[tiny.batch()], progress=False
            )
    assert len(caplog.records) == 1
    assert "size of the training set" in caplog.text


# --- FILet ----------------------------------------------------------------------------------

BATCH, LENGTH = 8, 10
ROUNDING = 1e-6
"""Transformers takes its loss in float32, whatever the model computes in."""


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, tiny.VOCABULARY, (2 * BATCH, LENGTH), generator=generator)


def moments_of_the_code(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and both factors of one layer from batches of 8 and the model's own mean loss."""
    model = tiny.llama().double()
    module = model.get_submodule(name)
    kept: dict[str, Tensor] = {}

    def keep(module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.update(x=inputs[0].detach(), y=output)

    module.register_forward_hook(keep)
    sx, sy, positions = 0.0, 0.0, 0
    for ids in rows().split(BATCH):
        loss = model(input_ids=ids, labels=ids).loss
        (g,) = torch.autograd.grad(loss, kept["y"])
        x, g = kept["x"].flatten(0, 1), g.flatten(0, 1)
        sx, sy, positions = sx + x.mT @ x, sy + g.mT @ g, positions + len(x)
    assert isinstance(sx, Tensor)
    assert isinstance(sy, Tensor)
    return module.weight.detach(), sx / positions, sy / positions


def filet_of_the_code(
    weight: Tensor, sx: Tensor, sy: Tensor, scaling: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its factors, candidate by candidate, and the energies of all candidates in rising order."""
    candidates = []
    for column in (weight.mT @ weight).mT:
        v = column / column.norm()
        u = weight @ v / (weight @ v).norm()
        candidates.append((float((v @ sx @ v) * (u @ sy @ u)), u, v))
    candidates.sort(key=lambda candidate: candidate[0])
    chosen = candidates[:RANK]
    q = torch.tensor([max(e, floor) ** 0.5 for e, _, _ in chosen], dtype=weight.dtype)
    a = torch.diag(q) @ torch.stack([v for _, _, v in chosen]) / scaling**0.5
    b = torch.stack([u for _, u, _ in chosen], dim=1) @ torch.diag(q) / scaling**0.5
    return a, b, torch.tensor([e for e, _, _ in candidates], dtype=weight.dtype)


@pytest.fixture(scope="module")
def collected() -> lorainit.Statistics:
    """This package's statistics of the same rows, in ragged batches of its own."""
    data = [{"input_ids": ids, "labels": ids} for ids in rows().split(5)]
    return lorainit.collect_statistics(
        tiny.llama().double(),
        LoraConfig(target_modules="all-linear"),
        data=data,
        needs=FILet().needs,
        progress=False,
    )


NAMES = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("floor", ["the paper's", "below all"])
def test_filet_term_by_term(name: str, floor: str, collected: lorainit.Statistics) -> None:
    """From the model's own mean loss over batches of 8, without a sequence's loss in sight."""
    weight, sx, sy = moments_of_the_code(name)
    layer = collected[name]
    assert relative(layer.input_second_moment, sx) < ROUNDING
    assert relative(layer.output_second_moment / BATCH**2, sy) < ROUNDING
    method = FILet.paper()
    if floor == "below all":
        method = replace(method, scale_floor=1e-30)
    assert method.scale_floor is not None
    a, b, energies = filet_of_the_code(weight, sx, sy, 2.0, method.scale_floor)
    found = method.solve(weight, layer, RANK, 2.0)
    assert relative(found.A, a) < ROUNDING
    assert relative(found.B, b) < ROUNDING
    assert found.anchored
    assert projector(found.A.mT).trace() == pytest.approx(RANK)
    hit = int((energies[:RANK] < method.scale_floor).sum())
    assert hit == (0 if floor == "below all" else RANK)


@pytest.mark.parametrize("name", NAMES)
def test_filet_in_a_sequences_own_units_is_another(
    name: str, collected: lorainit.Statistics
) -> None:
    """Control: energies that are 64 times larger, and so the factors' product, below the floor's reach."""
    weight, sx, sy = moments_of_the_code(name)
    a, b, _ = filet_of_the_code(weight, sx, sy, 2.0, 1e-30)
    method = replace(FILet.paper(), scale_floor=1e-30, loss_batch=1)
    found = method.solve(weight, collected[name], RANK, 2.0)
    assert relative(found.B @ found.A, 64 * b @ a) < ROUNDING
    assert relative(found.B @ found.A, b @ a) > 60
