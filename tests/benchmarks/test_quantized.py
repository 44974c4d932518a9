"""The grids of the quantized benchmark: how many values they have, and how much they take."""

from __future__ import annotations

import pytest
import torch
from benchmarks.quantized.quantizers import GROUP, QUANTIZERS, by_bitsandbytes, normal_float
from benchmarks.quantized.recover import table


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
