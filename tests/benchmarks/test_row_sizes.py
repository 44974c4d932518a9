"""Rows of another size leave the product as it is."""

from __future__ import annotations

import pytest
import torch
from benchmarks.quality.training.adapters import Start
from benchmarks.studies.row_sizes import BALANCED, KINDS, balanced, resized

from lorainit.types import LayerStatistics


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


@pytest.mark.parametrize("kind", BALANCED)
def test_balanced_rows_keep_the_product(kind: str) -> None:
    x, g = torch.randn(400, 12), torch.randn(400, 7)
    statistics = LayerStatistics(
        gradient_sum=g.mT @ x, input_second_moment_sum=x.mT @ x, output_second_moment_sum=g.mT @ g,
        sequences=400, label_tokens=400, positions=400,
    )  # fmt: skip
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    b[:, 2] = 0
    found = balanced(Start({"layer": (a, b)}, {}), {"layer": statistics}, 2.0, kind, 0.5)
    rows, columns = found.factors["layer"]
    torch.testing.assert_close(columns @ rows, b @ a, rtol=1e-4, atol=1e-5)
    # The third row is the gradient's next direction, or random and outside of the span of A.
    outside = rows - rows @ torch.linalg.pinv(a) @ a
    inside = float(outside.norm()) < 1e-4 * float(rows.norm())
    assert inside == (kind == "balanced")
