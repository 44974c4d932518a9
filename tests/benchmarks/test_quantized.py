"""The grids of the quantized benchmark: how many values they have, and how much they take."""

from __future__ import annotations

import pytest
import torch
from benchmarks.quantized.optimality import OWN, of_layer
from benchmarks.quantized.optimality import table as optimality_table
from benchmarks.quantized.quantizers import GROUP, QUANTIZERS, by_bitsandbytes, normal_float
from benchmarks.quantized.recover import NAMES, table

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


def test_normal_floats_are_those_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(48, 4 * GROUP, generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    torch.testing.assert_close(normal_float(weight), by_bitsandbytes(weight, double=False))
    assert not torch.equal(normal_float(weight), by_bitsandbytes(weight, double=True))


def test_the_table_says_what_share_is_gone() -> None:
    record = {
        "kind": "nf4", "rank": 8, "method": "QERA", "kl": 0.1, "kl_before": 0.4,
        "loss": 3.1, "loss_before": 3.4, "full_loss": 3.0,
    }  # fmt: skip
    assert "| nf4, 8 | QERA | 0.1000 | 75% | 3.1000 | 75% |" in table([record])


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
