"""The grids of the quantized benchmark: how many values they have, and how much they take."""

from __future__ import annotations

import pytest
import torch
from benchmarks.quantized.optimality import OWN, of_layer
from benchmarks.quantized.optimality import table as optimality_table
from benchmarks.quantized.quantizers import (
    GROUP,
    QUANTIZERS,
    by_bitsandbytes,
    dynamic_code,
    normal_float,
    rounded_scales,
)
from benchmarks.quantized.recovery_tables import NAMES

from lorainit.types import LayerStatistics


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_group_has_as_many_values_as_its_bits_allow(kind: str) -> None:
    weight = torch.randn(16, 4 * GROUP, generator=torch.Generator().manual_seed(0))
    found = QUANTIZERS[kind](weight.clone())
    bits = 4 if kind.startswith("nf4") else int(kind[-1])
    error = float((weight - found).norm() / weight.norm())
    assert 0.8 * {4: 0.09, 3: 0.19, 2: 0.4}[bits] < error < 1.3 * {4: 0.09, 3: 0.2, 2: 0.45}[bits]
    if not kind.startswith("hqq"):
        values = [len(group.unique()) for group in found.reshape(-1, GROUP)]
        assert max(values) <= 2**bits


def weights(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(83, 5 * GROUP, generator=generator)
    if kind == "heavy tails":
        return weight**3
    if kind == "small":
        return 1e-3 * weight
    if kind == "zeros":
        weight[3] = 0.0
    return weight


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "small", "zeros"])
@pytest.mark.parametrize("double", [False, True])
def test_normal_floats_are_those_of_bitsandbytes_to_the_bit(kind: str, double: bool) -> None:
    """With scales in float32, and with scales rounded themselves, in a last block that is not full."""
    pytest.importorskip("bitsandbytes")
    weight = weights(kind)
    found = normal_float(weight, double=double)
    assert found.equal(by_bitsandbytes(weight, double=double))
    assert not found.equal(by_bitsandbytes(weight, double=not double))


def test_a_million_scales_are_rounded_as_bitsandbytes_does() -> None:
    """Also where its table is not the nearest value, which a search would find."""
    functional = pytest.importorskip("bitsandbytes.functional")
    scales = torch.rand(2**20, generator=torch.Generator().manual_seed(2))
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=256)
    theirs = functional.dequantize_blockwise(codes, state) + mean
    assert rounded_scales(scales).equal(theirs)
    between = (dynamic_code()[1:] + dynamic_code()[:-1]) / 2
    relative = (scales - mean).view(-1, 256)
    relative = relative / relative.abs().amax(1, keepdim=True)
    differ = (torch.bucketize(relative, between).flatten() != codes).float().mean()
    assert 0 < differ < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_normal_floats_are_those_of_bitsandbytes_on_an_accelerator(double: bool) -> None:
    """But where its own comparisons, written as decimals, round another way."""
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    weight = weights("normal").cuda()
    found, theirs = normal_float(weight, double=double), by_bitsandbytes(weight, double=double)
    assert ((found - theirs).abs() > 1e-6).float().mean() < 1e-3


def test_scales_are_rounded_to_the_values_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert dynamic_code().equal(functional.create_dynamic_map())
    assert len(dynamic_code().unique()) == 256


def test_each_closed_form_is_the_least_in_its_own_metric() -> None:
    """And a form that is not is noticed."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 24) @ torch.randn(24, 24)
    outputs = torch.randn(400, 16) @ torch.randn(16, 16)
    statistics = LayerStatistics(
        input_second_moment_sum=inputs.mT @ inputs,
        output_second_moment_sum=outputs.mT @ outputs,
        sequences=20.0,
        label_tokens=400.0,
        positions=400.0,
    )
    found = of_layer(statistics, torch.randn(16, 24), 3)
    record = {"left": found}
    rows = [line.split("|")[1:5] for line in optimality_table([record]).splitlines()[2:]]
    assert [name.strip() for name, *_ in rows] == [NAMES.get(name, name) for name in OWN]
    for _, layers, excess, beaten in rows:
        assert int(layers) == 1
        assert abs(float(excess)) < 1e-5
        assert int(beaten) == 0
    wrong = {metric: dict(values) for metric, values in found.items()}
    wrong["both"]["both sides"] = 1.01 * found["both"]["QERA"]
    last = optimality_table([{"left": wrong}]).splitlines()[-1]
    assert float(last.split("|")[3]) > 1e-3
    assert int(last.split("|")[4]) == 1
