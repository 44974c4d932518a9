"""Linear algebra against dense float64, on spectra that iterations find hard."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorainit import linalg
from lorainit.errors import FactorizationError, NonFiniteError, RankError
from lorainit.linalg import damped_factors, leading, subspace_iteration, thresholds
from lorainit.linalg.dense import gram_svd
from lorainit.statistics.memory.peak import LiveBytes

N = 800
assert N > thresholds.DENSE_LIMIT

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


def orthogonal(n: int, k: int | None = None, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k or n, generator=rng, dtype=torch.float64)).Q


def sine(found: Tensor, wanted: Tensor) -> float:
    """Largest sine between two spans of orthonormal columns; the first is made orthonormal."""
    found = torch.linalg.qr(found.double()).Q
    return float(torch.linalg.matrix_norm(found - wanted @ (wanted.mT @ found), 2).max())


def bulk(n: int) -> Tensor:
    return torch.linspace(1.0, 3.0, n, dtype=torch.float64)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


# The first six values are sought, and all are at least -1.
SPECTRA = {
    "separated": torch.cat([torch.linspace(-1, 0, 6, dtype=torch.float64), bulk(N - 6)]),
    "clustered": torch.cat([-0.5 + 1e-6 * torch.arange(6, dtype=torch.float64), bulk(N - 6)]),
    "repeated": torch.cat([-0.7 * ones(6), bulk(N - 6)]),
    "zero": torch.cat([0.0 * ones(6), bulk(N - 6)]),
    "two levels": torch.cat([-0.9 * ones(6), ones(N - 6)]),
    "reaching far up": torch.cat(
        [torch.linspace(-1, -0.5, 6, dtype=torch.float64), torch.logspace(0, 3, N - 6).double()]
    ),
}


@DTYPES
@pytest.mark.parametrize("name", list(SPECTRA))
def test_smallest_of_operator(name: str, dtype: torch.dtype) -> None:
    """Values and span; a spectrum that reaches a thousand times as far may be given up, not got wrong."""
    q, values = orthogonal(N), SPECTRA[name]
    matrix = ((q * values) @ q.mT).to(dtype)
    matrix = (matrix + matrix.mT) / 2
    tolerance = TOLERANCE[dtype] * (20 if name == "reaching far up" else 1)
    upper = 1.001 * values[-1].to(dtype)
    found = linalg.smallest_of_operator(matrix.matmul, matrix, 6, upper=upper)
    if found is None:
        assert name == "reaching far up"
        return
    assert float((found[0].double() - values[:6]).abs().max()) < tolerance
    assert sine(found[1], q[:, :6]) < tolerance
    assert torch.allclose(found[1].mT @ found[1], torch.eye(6, dtype=dtype), atol=1e-5)


@pytest.mark.parametrize("name", ["separated", "clustered", "two levels"])
def test_rough_products_are_measured_exactly(name: str) -> None:
    """Products in float32, residuals in float64: as good as float32 allows, or float64 goes on."""
    q, values = orthogonal(N), SPECTRA[name]
    matrix = (q * values) @ q.mT
    matrix = (matrix + matrix.mT) / 2
    rough = matrix.float()
    products = {"rough": 0, "exact": 0}

    def times(which: str) -> Callable[[Tensor], Tensor]:
        def apply(block: Tensor) -> Tensor:
            products[which] += 1
            assert block.dtype == (torch.float64 if which == "exact" else torch.float32)
            return (matrix if which == "exact" else rough) @ block

        return apply

    for tolerance, angle in ((1e-5, 1e-5), (1e-10, 1e-9)):
        products.update(rough=0, exact=0)
        found = linalg.smallest_of_operator(
            times("exact"),
            matrix,
            6,
            upper=values[-1] * 1.001,
            tolerance=tolerance,
            rough=times("rough"),
        )
        assert found is not None
        residual = (matrix @ found[1] - found[1] * found[0]).norm(dim=0)
        assert float(residual.max()) <= tolerance * float(values[:6].abs().max()) * 1.01
        assert name == "clustered" or sine(found[1], q[:, :6]) < angle
        if tolerance == 1e-5:
            assert 0 < products["exact"] <= products["rough"] / 2
            # Coarse products that are the rough ones take their place, and no more rounds.
            before = products["rough"]
            products.update(rough=0, exact=0, coarse=0)
            linalg.smallest_of_operator(
                times("exact"),
                matrix,
                6,
                upper=values[-1] * 1.001,
                tolerance=tolerance,
                rough=times("rough"),
                coarse=times("coarse"),
            )
            assert products["coarse"] > 0
            assert products["coarse"] + products["rough"] <= before
        else:
            assert products["exact"] > 2


@DTYPES
@pytest.mark.parametrize("name", ["flat", "one far out", "falling"])
def test_bound_of_operator(name: str, dtype: torch.dtype) -> None:
    """Above every eigenvalue, or hardly below, and not far above; a stack of two sizes."""
    values = {
        "flat": torch.linspace(0.5, 1, N).double(),
        "one far out": torch.cat([torch.linspace(0, 1, N - 1), torch.tensor([50.0])]).double(),
        "falling": torch.arange(1, N + 1).double() ** -0.5,
    }[name]
    q = orthogonal(N)
    matrix = torch.stack([(q * values) @ q.mT, (q * values * 1e-8) @ q.mT]).to(dtype)
    found = linalg.bound_of_operator(matrix.matmul, matrix) / torch.tensor([1.0, 1e-8])
    assert bool((found >= 0.98 * values.max()).all())
    assert bool((found <= 1.5 * values.max()).all())


def test_an_upper_bound_that_is_none_gives_nothing_wrong() -> None:
    """Eigenvalues above the bound grow too: the residuals tell, and nothing is returned."""
    q, values = orthogonal(N), SPECTRA["separated"]
    matrix = (q * values) @ q.mT
    found = linalg.smallest_of_operator(
        matrix.matmul, matrix, 6, upper=torch.tensor(1.2, dtype=torch.float64)
    )
    assert found is None or sine(found[1], q[:, :6]) < 1e-8


def test_more_repeated_eigenvalues_than_a_block_holds() -> None:
    """Any six of forty equal directions will do: they must be eigenvectors and orthonormal."""
    q = orthogonal(N)
    values = torch.cat([-ones(40), bulk(N - 40)])
    matrix = (q * values) @ q.mT
    found = linalg.smallest_of_operator(matrix.matmul, matrix, 6, upper=values[-1])
    assert found is not None
    residual = matrix @ found[1] - found[1] * found[0]
    assert float(residual.norm(dim=0).max()) < 1e-8
    assert sine(found[1], q[:, :40]) < 1e-8
    assert torch.allclose(found[1].mT @ found[1], torch.eye(6, dtype=torch.float64), atol=1e-8)


DECAYS = {
    "separated": torch.cat([torch.linspace(3, 2, 6), torch.linspace(1, 0, N - 6)]).double(),
    "clustered": torch.cat(
        [2 + 1e-6 * torch.arange(6).flip(0), torch.linspace(1, 0, N - 6)]
    ).double(),
    "repeated": torch.cat([2 * torch.ones(6), torch.linspace(1, 0, N - 6)]).double(),
    "rank six": torch.cat([torch.linspace(3, 2, 6), torch.zeros(N - 6)]).double(),
    "long tail": torch.arange(1, N + 1).double() ** -1.0,
    "steep": torch.logspace(0, -6, N).double(),
    "nearly flat": torch.linspace(2, 0, N).double(),
}


@DTYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", list(DECAYS))
def test_top_singular_by_iteration(
    name: str, wide: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    u, s, v = orthogonal(N + 50, N), DECAYS[name], orthogonal(N, seed=1)
    if wide:
        u, v = v, u
    matrix = ((u * s) @ v.mT).to(dtype)
    found = leading._filtered_svd(matrix, 6, leading._tolerance(matrix, None))
    assert found is not None
    again = linalg.top_singular(matrix, 6)
    # By default float32 stops earlier: by Wedin's bound a residual over a gap is a sine, and what the
    # subspace holds falls short by its square.
    short = leading.EACH * float(s[5] / (s[5] - s[6])) if dtype == torch.float32 else 0.0
    asked = linalg.top_singular(matrix, 6, tolerance=leading._tolerance(matrix, None))
    angles = (TOLERANCE[dtype], TOLERANCE[dtype], TOLERANCE[dtype] + 2 * short)
    for got, angle in zip((found, asked, again), angles, strict=True):
        assert float((got[1].double() - s[:6]).abs().max()) < TOLERANCE[dtype]
        assert sine(got[0], u[:, :6]) < angle
        assert sine(got[2], v[:, :6]) < angle
    rebuilt = (again[0] * again[1]) @ again[2].mT
    error = float((rebuilt.double() - (u[:, :6] * s[:6]) @ v[:, :6].mT).norm())
    assert error < TOLERANCE[dtype] + 8 * short * float(s[0])
    held = float((matrix.double() @ again[2].double()).square().sum())
    assert held > (1 - 1e-5) * float(s[:6].square().sum())
    assert float((linalg.largest_singular_value(matrix) - s[0]).abs()) < TOLERANCE[dtype]


@DTYPES
def test_largest_eigenvectors_by_iteration(dtype: torch.dtype) -> None:
    q, values = orthogonal(N), DECAYS["long tail"]
    matrix = ((q * values) @ q.mT).to(dtype)
    found, vectors = linalg.largest_eigenvectors(matrix, 6)
    assert float((found.double() - values[:6]).abs().max()) < TOLERANCE[dtype]
    assert sine(vectors, q[:, :6]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("units", "dtype"),
    [(False, torch.float32), (True, torch.float32), (False, torch.float64)],
)
def test_less_rank_than_is_sought(
    units: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By iteration, with and without halves: orthonormal vectors also where values are rounding."""
    for place in (thresholds, leading):
        monkeypatch.setattr(place, "on_matrix_units", lambda matrix: units)
    monkeypatch.setattr(thresholds, "DENSE_LIMIT", 50)
    left, right = orthogonal(200, 5), orthogonal(160, 5, seed=1)
    sizes = torch.logspace(0, -2, 5, dtype=torch.float64) * 1e-9
    matrix = torch.stack([(left * sizes) @ right.mT, torch.zeros(200, 160).double()]).to(dtype)
    u, s, v = linalg.top_singular(matrix, 12)
    assert torch.allclose(s[0, :5].double(), sizes, rtol=1e-4)
    assert torch.allclose((u[0] * s[0]) @ v[0].mT, matrix[0], atol=1e-4 * float(s[0, 0]))
    assert float(s[0, 5:].max()) < 1e-5 * float(s[0, 0])
    for basis in (u, v):
        eye = torch.eye(12, dtype=dtype).expand(2, 12, 12)
        assert torch.allclose(basis.mT @ basis, eye, atol=1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("which", ["smallest", "largest", "singular"])
def test_dense_finishes_what_does_not_converge(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product is never enough for a flat spectrum; the answer is right all the same."""
    monkeypatch.setattr(subspace_iteration, "_MAX_PRODUCTS", 4)
    q = orthogonal(N)
    values = torch.linspace(1.0, 2.0, N, dtype=torch.float64)
    matrix = (q * values) @ q.mT
    if which == "smallest":
        # The caller forms the matrix; see the methods' tests.
        assert linalg.smallest_of_operator(matrix.matmul, matrix, 6, upper=values[-1]) is None
        return
    assert leading._filtered_svd(matrix, 6, 1e-10) is None
    vectors = (
        linalg.largest_eigenvectors(matrix, 6)[1]
        if which == "largest"
        else linalg.top_singular(matrix, 6)[2]
    )
    assert sine(vectors, q[:, -6:]) < 1e-8


# --- what layers share ----------------------------------------------------------------------


def test_once_works_once_for_what_is_expanded() -> None:
    shared = torch.randn(2, 1, 5, 5, dtype=torch.float64).expand(2, 3, 5, 5)
    seen: list[tuple[int, ...]] = []

    def square(matrix: Tensor) -> Tensor:
        seen.append(tuple(matrix.shape))
        return matrix @ matrix

    found = linalg.once(square, shared)
    assert seen == [(2, 1, 5, 5)]
    assert found.shape == (2, 3, 5, 5)
    assert found.stride(1) == 0
    assert torch.equal(found, square(shared.contiguous()))
    block = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert torch.allclose(linalg.product(shared, block), shared.contiguous() @ block, atol=1e-12)
    assert torch.allclose(linalg.product(shared.mT, block), shared.mT.contiguous() @ block)


# --- dense parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("rank", [0, 7, 30])
def test_float32_svd_by_gram(shape: tuple[int, int], rank: int) -> None:
    """Against LAPACK in float64, rank-deficient and zero matrices included."""
    rng = torch.Generator().manual_seed(0)
    left = torch.randn(2, shape[0], rank, generator=rng)
    matrix = left @ torch.randn(2, rank, shape[1], generator=rng)
    u, s, v = linalg.svd(matrix)
    wanted = torch.linalg.svdvals(matrix.double())
    scale = max(float(wanted.max()), 1.0)
    assert float((s - wanted).abs().max()) < 1e-6 * scale
    assert float(((u * s.unsqueeze(-2)) @ v.mT - matrix).norm()) < 1e-5 * scale
    eye = torch.eye(s.shape[-1])
    for vectors in (u, v):
        assert torch.allclose(vectors.mT @ vectors, eye.expand(2, -1, -1), atol=1e-5)
    bottom = linalg.bottom_singular(matrix, 4)
    assert torch.allclose(bottom[1], s[..., -4:])


@pytest.mark.parametrize(
    "name", ["flat", "steep", "less rank than is sought", "one of a stack is zero"]
)
@pytest.mark.parametrize("wide", [True, False])
def test_leading_triplets_of_small_float32_matrices(
    name: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By iteration on the Gram matrix, and as near to the best cut in float64 as the dense way comes."""
    n, m, k = 300, 340, 8
    left, right = orthogonal(n), orthogonal(m, n, seed=1)
    sizes = {
        "flat": torch.linspace(2.0, 1.0, n, dtype=torch.float64),
        "steep": 10.0 ** -torch.linspace(0, 60, n, dtype=torch.float64),
        "less rank than is sought": torch.cat([ones(5), torch.zeros(n - 5).double()]),
        "one of a stack is zero": torch.linspace(2.0, 1.0, n, dtype=torch.float64),
    }[name]
    matrix = ((left * sizes) @ right.mT).float()
    zero = torch.zeros_like(matrix) if name == "one of a stack is zero" else matrix
    stack = torch.stack([matrix, zero])
    stack = stack if wide else stack.mT
    dense = gram_svd(stack, k)
    monkeypatch.setattr(leading, "eigh", lambda matrix: pytest.fail("decomposed whole"))
    found = linalg.top_singular(stack, k)
    eye = torch.eye(k).expand(2, k, k)
    wanted = torch.stack([sizes[:k], 0 * sizes[:k] if zero is not matrix else sizes[:k]])
    assert torch.allclose(found[1].double(), wanted, atol=3e-7 * float(sizes[0]))
    for vectors in (found[0], found[2]):
        assert torch.allclose(vectors.mT @ vectors, eye, atol=3e-6)

    def missed(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        cut = (u.double() * s.double().unsqueeze(-2)) @ v.double().mT
        return (stack.double() - cut).norm(dim=(-2, -1))

    assert bool((missed(*found) <= missed(*dense) * (1 + 1e-9) + 1e-6).all())


def test_signs_do_not_depend_on_the_input_sign_or_dtype() -> None:
    matrix = orthogonal(20)[:, :12] * torch.arange(12, 0, -1)
    one = linalg.top_singular(matrix, 3)
    other = linalg.top_singular(-matrix, 3)
    low = linalg.top_singular(matrix.float(), 3)
    assert torch.allclose(one[2], other[2])
    assert torch.allclose(one[0], -other[0])
    assert torch.allclose(one[0].float(), low[0], atol=1e-5)
    largest = one[2].abs().argmax(dim=0, keepdim=True)
    assert bool((one[2].gather(0, largest) > 0).all())


def test_orthonormal_rows_keeps_the_product() -> None:
    left, right = torch.randn(2, 9, 3).double(), torch.randn(2, 12, 3).double()
    rows, content = linalg.orthonormal_rows(left, right)
    assert torch.allclose(content @ rows, left @ right.mT)
    assert torch.allclose(rows @ rows.mT, torch.eye(3).double().expand(2, -1, -1))
    gram = content.mT @ content
    assert torch.allclose(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)), atol=1e-10)


def test_damping() -> None:
    diagonal = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    relative = linalg.damping_value(diagonal, 0.1, "relative")
    assert float(relative[0]) == pytest.approx(0.2)
    assert 0 < float(relative[1]) < 1e-20
    assert torch.equal(linalg.damping_value(diagonal, 0.1, "absolute"), torch.full((2,), 0.1))


def test_cholesky_goes_on_in_float64_where_float32_fails() -> None:
    """Rank five of thirty, damped below float32's rounding: float64 factors it, and rightly."""
    x = orthogonal(30, 5).float() * 100
    matrix, damping = x @ x.mT, torch.tensor(3e-3)
    assert int(torch.linalg.cholesky_ex(linalg.add_to_diagonal(matrix, 0 * damping)).info) > 0
    strict = torch.tensor(1e-4)
    assert int(torch.linalg.cholesky_ex(linalg.add_to_diagonal(matrix, strict)).info) > 0
    factor = linalg.damped_cholesky(matrix, damping, "the test matrix")
    wanted = linalg.add_to_diagonal(matrix.double(), damping.double())
    assert float((factor.double() @ factor.double().mT - wanted).norm()) < 1e-2


def test_cholesky_of_a_large_stack_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, by columns: what a CUDA device does, on a CPU."""
    half = torch.randn(2, 1, 40, 60, generator=torch.Generator().manual_seed(0))
    matrix = (half @ half.mT).expand(2, 3, 40, 40)
    before = matrix.clone()
    damping = torch.tensor([[0.1], [0.2]], dtype=torch.float64).expand(2, 3)
    wanted = linalg.damped_cholesky(matrix, damping, "the matrix")
    monkeypatch.setattr(damped_factors, "_one_by_one", lambda matrix: matrix.dim() > 2)
    found = linalg.damped_cholesky(matrix, damping, "the matrix")
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(matrix, before)
    wide = before.double()
    linalg.damped_cholesky(wide, damping, "the matrix")
    assert torch.equal(wide, before.double())
    with pytest.raises(FactorizationError, match="not positive definite"):
        linalg.damped_cholesky(matrix - 100 * torch.eye(40), damping, "the matrix")


def test_cholesky_of_a_large_matrix_alone_takes_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is solved by itself, as on a CUDA device: factored in place, with the same digits."""
    half = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    matrix, damping = half @ half.mT, torch.tensor(0.1, dtype=torch.float64)
    peaks, factors = [], []
    for alone in (False, True):
        monkeypatch.setattr(damped_factors, "_one_by_one", lambda matrix, alone=alone: alone)
        with LiveBytes() as meter:
            factors.append(linalg.damped_cholesky(matrix, damping, "the matrix"))
        peaks.append(meter.peak / factors[0].nbytes)
    assert torch.allclose(*factors, rtol=1e-12, atol=1e-12)
    assert peaks[1] < 1.1 < 1.9 < peaks[0]


def test_cholesky_that_fails_twice_is_an_error() -> None:
    matrix = -torch.eye(4)
    with pytest.raises(FactorizationError, match="the test matrix is not positive definite"):
        linalg.damped_cholesky(matrix, torch.tensor(1e-3), "the test matrix")


def test_what_is_not_finite_is_an_error() -> None:
    bad = torch.full((3, 3), float("nan"))
    with pytest.raises(NonFiniteError, match="the test matrix"):
        linalg.check_finite(bad, "the test matrix")
    for solver in (linalg.eigh, linalg.svd, lambda m: linalg.svd(m.double())):
        with pytest.raises(FactorizationError, match="did not converge"):
            solver(bad)


@pytest.mark.parametrize(("rank", "factor"), [(0, 1), (5, 1), (3, 2)])
def test_check_rank(rank: int, factor: int) -> None:
    with pytest.raises(RankError, match="min\\(out, in\\) = 4"):
        linalg.check_rank(rank, 4, 9, factor=factor)
    linalg.check_rank(2, 4, 9, factor=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("turned", [False, True])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, bad: float, turned: bool) -> None:
    matrix = torch.linspace(-1, 1, 35, dtype=torch.float32).reshape(5, 7).to(dtype)
    matrix = matrix.mT if turned else matrix
    assert linalg.all_finite(matrix)
    assert linalg.all_finite(matrix.expand(3, *matrix.shape))
    matrix[2, 3] = bad
    assert not linalg.all_finite(matrix)
    assert not linalg.all_finite(matrix.expand(3, *matrix.shape))
