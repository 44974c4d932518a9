"""Every method on one-hot inputs: the diagonal of counts gives what the matrix of it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorainit.methods import METHODS
from lorainit.methods.table import STARTS
from lorainit.types import Diagonal, Factors, LayerStatistics
from tests.methods.common import layer, relative, solve
from tests.methods.contract import DRAWN

READ_INPUTS = [n for n in STARTS if "input_second_moment" in METHODS[n]().needs]


def one_hot(
    words: int = 40, out: int = 14
) -> tuple[torch.Tensor, LayerStatistics, LayerStatistics]:
    """A weight, and its statistics as counts and as matrices."""
    weight, statistics = layer(out=out, inner=words)
    # Of no two words the same, so that every eigenvector is one.
    order = torch.randperm(words, generator=torch.Generator().manual_seed(1))
    counts = torch.linspace(0, 5, words, dtype=torch.float64).exp()[order]
    few = replace(
        statistics,
        input_second_moment_sum=None,
        input_sum=None,
        input_counts=counts,
        positions=float(counts.sum()),
    )
    dense = replace(few, input_counts=None, input_second_moment_sum=counts.diag(), input_sum=counts)
    return weight, few, dense


def products(factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    return factors.A.mT @ factors.A, factors.B @ factors.B.mT


@pytest.mark.parametrize("name", READ_INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_optimum_of_counts_is_that_of_their_matrix(name: str, dtype: torch.dtype) -> None:
    """Which tests/methods shows to be the method's own; the control is of other counts."""
    weight, few, dense = one_hot()
    weight, few, dense = weight.to(dtype), few.to(dtype=dtype), dense.to(dtype=dtype)
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    found, wanted = (products(solve(name, weight, s)) for s in (few, dense))
    for got, true in zip(found, wanted, strict=True):
        assert relative(got, true) <= bound
    if name in ("farss", "filet"):
        # These choose among a few directions of the weight, whose order counts may leave.
        return
    assert few.input_counts is not None
    other = replace(few, input_counts=few.input_counts.flip(0))
    changed = products(solve(name, weight, other))
    assert max(relative(a, b) for a, b in zip(changed, wanted, strict=True)) > 100 * bound


@pytest.mark.parametrize("name", [n for n in READ_INPUTS if n not in DRAWN])
def test_a_stack_of_one(name: str) -> None:
    """How the pipeline hands it over."""
    weight, few, _ = one_hot()
    alone = solve(name, weight, few)
    stacked = solve(name, weight.unsqueeze(0), LayerStatistics.stack([few]))
    for got, wanted in zip(products(stacked[0]), products(alone), strict=True):
        assert relative(got, wanted) <= 1e-9


@pytest.mark.parametrize("name", ["lora-da", "natural", "eva", "cg-lora", "corda", "astra"])
def test_no_matrix_of_words_is_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more words than a dense solver is quicker for."""

    def refuse(*args: object) -> torch.Tensor:
        raise AssertionError("formed")

    monkeypatch.setattr(Diagonal, "dense", refuse)
    monkeypatch.setattr(torch, "diag_embed", refuse)
    weight, few, dense = one_hot(900)
    found = products(solve(name, weight, few))
    monkeypatch.undo()
    for got, wanted in zip(found, products(solve(name, weight, dense)), strict=True):
        assert relative(got, wanted) <= 1e-6


def test_what_a_diagonal_computes() -> None:
    torch.manual_seed(0)
    values, vector = torch.rand(2, 5).double() + 1, torch.randn(2, 5).double()
    matrix = Diagonal(values, vector)
    dense = values.diag_embed() - vector[:, :, None] * vector[:, None, :]
    block = torch.randn(2, 5, 3).double()
    torch.testing.assert_close(matrix.dense(), dense)
    torch.testing.assert_close(matrix @ block, dense @ block)
    torch.testing.assert_close(block.mT @ matrix, block.mT @ dense)
    torch.testing.assert_close(matrix.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    assert matrix.shape == dense.shape
    assert matrix.float().dtype == torch.float32
    with pytest.raises(TypeError):
        torch.linalg.inv(matrix)  # type: ignore[arg-type]
