"""Matrices in two halves, and substitution by blocks, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorainit import linalg
from lorainit.linalg import split_precision, thresholds
from lorainit.linalg.split_precision import SplitMatrix
from lorainit.linalg.triangular import Triangle, gram_of_lower, lower_inverse
from lorainit.statistics.memory.peak import LiveBytes

FLOAT32 = 4e-7
"""What a product in float32 is off by, relative, with sums of some hundred terms."""


def random(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest relative error over a stack."""
    rest = (found.double() - wanted).flatten(-2).norm(dim=-1)
    return float((rest / wanted.flatten(-2).norm(dim=-1)).max())


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_products_are_as_exact_as_float32(size: float) -> None:
    matrix = (random(3, 90, 130) * size).float()
    matrix[1] *= 1e-6
    block, other = random(3, 130, 8, seed=1), random(3, 90, 8, seed=2)
    block[..., 3] *= 1e-12
    halves = SplitMatrix.of(matrix)
    assert off(halves.times(block), matrix.double() @ block) < FLOAT32
    assert off(halves.transposed_times(other), matrix.double().mT @ other) < FLOAT32
    # Columns are scaled each by itself, and one of zeros stays one.
    alone = halves.times(block)[..., 3:4]
    assert off(alone, matrix.double() @ block[..., 3:4]) < FLOAT32
    block[..., 5] = 0
    assert not bool(halves.times(block)[..., 5].any())


@pytest.mark.parametrize("units", [True, False])
def test_products_of_whole_matrices(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as in float32; one right side may serve several left ones."""
    monkeypatch.setattr(thresholds, "has_matrix_units", lambda like: units)
    left, right = random(2, 3, 50, 70), random(2, 3, 70, 40, seed=1)
    right[1] *= 1e9
    shared = random(2, 1, 70, 40, seed=2).expand(2, 3, 70, 40)
    for other in (right, shared, right.mT.contiguous().mT):
        found = linalg.whole_product(left.float(), _narrow(other))
        assert off(found, left @ other) < FLOAT32
    assert linalg.whole_product(left[0, 0].float(), right[0, 0].float()).shape == (50, 40)
    exact = linalg.whole_product(left, right)
    assert exact.dtype == torch.float64
    assert off(exact, left @ right) < 1e-14


def _narrow(stack: Tensor) -> Tensor:
    """In float32, as it is laid out."""
    return linalg.once(lambda matrix: matrix.float(), stack)


def test_leading_digits_alone_are_not_enough() -> None:
    """What is left of a matrix in half precision counts: without it the products are 1e-4 off."""
    matrix, block = random(1, 90, 130).float(), random(1, 130, 8, seed=1)
    halves = SplitMatrix.of(matrix)
    halves.parts[:, 90:] = 0
    assert off(halves.times(block), matrix.double() @ block) > 1e-4


def test_leading_digits_by_themselves() -> None:
    matrix, block, other = random(3, 90, 130), random(3, 130, 8, seed=1), random(3, 90, 8, seed=2)
    halves = SplitMatrix.of(matrix.float())
    leading = halves.leading
    assert leading.part.data_ptr() == halves.parts.data_ptr()
    assert 1e-5 < off(leading.times(block), matrix @ block) < 5e-4
    assert 1e-5 < off(leading.transposed_times(other), matrix.mT @ other) < 5e-4
    assert off(leading.gram_times(block), matrix.mT @ (matrix @ block)) < 1e-3
    shared = SplitMatrix.of(random(2, 1, 50, 70).float().expand(2, 3, 50, 70)).leading
    blocks = random(2, 3, 70, 4, seed=1)
    assert off(shared.times(blocks), random(2, 1, 50, 70) @ blocks) < 5e-4


def test_wide_range_within_a_matrix() -> None:
    """Rows a million times smaller than others keep most digits."""
    matrix = (random(1, 60, 80) * torch.logspace(0, -6, 60).unsqueeze(-1)).float()
    block = random(1, 80, 4, seed=1)
    rest = (
        (SplitMatrix.of(matrix).times(block).double() - matrix.double() @ block).abs().amax((0, 2))
    )
    scale = (matrix.double() @ block).abs().amax((0, 2))
    assert float((rest / scale).max()) < 1e-4
    assert float((rest / scale)[:30].max()) < 2e-6


def test_one_matrix_for_several_blocks() -> None:
    matrix = random(2, 1, 50, 70).float().expand(2, 3, 50, 70)
    block, other = random(2, 3, 70, 4, seed=1), random(2, 3, 50, 4, seed=2)
    halves = SplitMatrix.of(matrix)
    assert halves.parts.shape == (2, 100, 70)
    assert off(halves.times(block), matrix.double() @ block) < FLOAT32
    assert off(halves.transposed_times(other), matrix.double().mT @ other) < FLOAT32


def factor(batch: int, n: int) -> Tensor:
    """Cholesky factors with a condition of about 120; one of them a millionth as large."""
    x = random(batch, 2 * n, n) * torch.arange(1, n + 1).double() ** -0.7
    x[-1] *= 1e-6
    second = x.mT @ x / (2 * n)
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-3 * diagonal.mean(-1, keepdim=True)
    return torch.linalg.cholesky(second)


@pytest.mark.parametrize("n", [1, 63, 64, 129, 300])
def test_lower_inverse(n: int) -> None:
    lower = factor(2, n)
    inverse = lower_inverse(lower)
    eye = torch.eye(n, dtype=torch.float64).expand(2, n, n)
    assert off(inverse @ lower, eye) < 1e-12
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("block", [64, 100, 300, 512])
def test_substitution_by_blocks(block: int) -> None:
    lower, right = factor(2, 300), random(2, 300, 7, seed=3)
    triangle, inverse = Triangle(lower, block), torch.linalg.inv(lower)
    assert off(triangle.solve(right), inverse @ right) < 1e-12
    assert off(triangle.solve_transposed(right), inverse.mT @ right) < 1e-12
    assert off(triangle.solve_quickly(right.float()), inverse @ right) < 1e-6
    assert off(triangle.inverse_quickly(), inverse) < 1e-6
    # The transposed factor is another one.
    assert off(triangle.solve_transposed(right), inverse @ right) > 0.1


def test_substitution_with_a_shared_factor() -> None:
    lower = factor(2, 150).unsqueeze(1).expand(2, 3, 150, 150)
    right, inverse = random(2, 3, 150, 5, seed=3), torch.linalg.inv(lower)
    triangle = Triangle(lower, 64)
    assert triangle.lower.shape == (2, 150, 150)
    assert off(triangle.solve(right), inverse @ right) < 1e-12
    assert off(triangle.solve_transposed(right), inverse.mT @ right) < 1e-12
    assert off(triangle.solve_quickly(right), inverse @ right) < 1e-6


def test_badly_conditioned_factors_lose_what_float32_loses() -> None:
    """A condition of 1e4: errors grow with it, and stay those of float32."""
    x = random(1, 400, 200) * torch.logspace(0, -4, 200)
    lower = torch.linalg.cholesky(x.mT @ x + 1e-10 * torch.eye(200))
    inverse = torch.linalg.inv(lower)
    assert off(Triangle(lower, 64).inverse_quickly(), inverse) < 1e-4


@pytest.mark.parametrize("panel", [64, 128, 1024])
def test_gram_of_lower(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorainit.linalg.triangular._PANEL", panel)
    inverse = torch.linalg.inv(factor(2, 300))
    narrow = inverse.float()
    found = gram_of_lower(narrow)
    assert found.data_ptr() == narrow.data_ptr()
    assert off(found, inverse.mT @ inverse) < 1e-6
    assert off(found, found.mT.double()) < 1e-6


@pytest.mark.parametrize("slab", [1, 500, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slabs_change_nothing(
    slab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random(5, 30, 40).to(dtype)
    whole = SplitMatrix.of(matrix)
    monkeypatch.setattr(split_precision, "_SLAB", slab)
    parts = SplitMatrix.of(matrix)
    assert torch.equal(parts.parts, whole.parts)
    assert torch.equal(parts.scale, whole.scale)
    high, low = whole.parts.unflatten(1, (2, 30)).unbind(1)
    held = (high.double() + low.double()) * whole.scale
    assert off(held, matrix.double()) < 2**-22


def test_splitting_needs_no_copy_of_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(4, 100, 100).float()
    nbytes = matrix.numel() * 4

    def peak() -> float:
        with LiveBytes() as meter:
            SplitMatrix.of(matrix)
        return meter.peak / nbytes

    monkeypatch.setattr(split_precision, "_SLAB", 1000)
    assert peak() < 1.2
    monkeypatch.setattr(split_precision, "_SLAB", 2**24)
    assert peak() > 1.8
