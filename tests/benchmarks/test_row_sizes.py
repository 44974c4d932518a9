"""Rows of another size leave the product as it is."""

from __future__ import annotations

import pytest
import torch
from benchmarks.quality.row_sizes import KINDS, resized
from benchmarks.quality.stacked import Start


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_stays_and_the_rows_have_the_size(kind: str) -> None:
    x = torch.randn(400, 12) * torch.logspace(0, -2, 12)
    second = x.mT @ x / len(x)
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    found = resized(Start({"layer": (a, b)}, {}), {"layer": second}, kind, 0.5)
    rows, columns = found.factors["layer"]
    torch.testing.assert_close(columns @ rows, b @ a, rtol=1e-4, atol=1e-5)
    if kind == "norm":
        torch.testing.assert_close(rows, 0.5 * a)
        return
    gram = rows @ second @ rows.mT
    wanted = 0.25 * second.diagonal().mean() / 3
    if kind == "mean activation":
        torch.testing.assert_close(gram.diagonal().mean(), wanted)
    else:
        torch.testing.assert_close(gram.diagonal(), wanted.expand(3))
    mixed = gram - torch.diag(gram.diagonal())
    assert (float(mixed.abs().max()) < 1e-4 * float(wanted)) == (kind == "decorrelated")
