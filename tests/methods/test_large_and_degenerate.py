"""Layers above the size where iterations take over, and layers that got no signal."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lorainit import linalg
from lorainit.linalg import leading, subspace_iteration, thresholds
from lorainit.linalg.leading import EACH
from lorainit.linalg.split_precision import Leading, SplitMatrix
from lorainit.methods import EVA, METHODS, LoraDA
from lorainit.types import LayerStatistics
from tests.methods.common import OUT, RANK, angle, layer, product, relative, solve


@pytest.mark.parametrize(
    "method", [LoraDA(), LoraDA(beta=3.0), LoraDA.paper(), LoraDA(rescale_variance=True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lora_da_by_iteration_is_the_dense_one(
    method: LoraDA, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 inputs, never forming Omega, against the eigenvectors of an explicit Omega."""
    weight, statistics = layer(out=40, inner=800, dtype=dtype)
    given: list[bool] = []
    iterate = linalg.smallest_of_operator

    def spy(*args: object, **kwargs: object) -> tuple[Tensor, Tensor] | None:
        found = iterate(*args, **kwargs)  # type: ignore[arg-type]
        given.append(found is not None)
        return found

    monkeypatch.setattr(linalg, "smallest_of_operator", spy)
    found = solve(method, weight, statistics)
    assert given == [True, True]
    fisher = method._fisher(statistics)
    inverse = torch.cholesky_inverse(fisher.z_factor)
    change = -inverse @ fisher.scaled().mT
    norm = torch.linalg.matrix_norm(change, 2)
    change = change / norm
    omega = fisher.variance / norm**2 * inverse - method.bias_weight * change @ change.mT
    wanted = torch.linalg.eigh(omega)[1][:, :RANK]
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    assert angle(found.A.mT, wanted) < tolerance
    assert relative(product(found, 1.0), change.mT @ wanted @ wanted.mT / method.gamma) < tolerance


@pytest.mark.parametrize(
    "name", ["pissa", "loftq", "eva", "qera", "lora-one", "kronecker-qer", "natural"]
)
def test_other_methods_by_iteration_are_the_dense_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = layer(out=400, inner=450)
    monkeypatch.setattr(leading, "_SYMMETRIC_LIMIT", 10_000)
    dense = solve(name, weight, statistics)
    monkeypatch.setattr(thresholds, "DENSE_LIMIT", 100)
    iterated = solve(name, weight, statistics)
    assert not torch.equal(iterated.A, dense.A)
    assert relative(iterated.A, dense.A) < 1e-6
    assert relative(product(iterated), product(dense)) < 1e-6


@pytest.mark.parametrize(
    "name", ["lora-da", "natural", "lora-ga", "pissa", "corda", "qera", "kronecker-qer"]
)
def test_products_in_halves_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does, on a CPU: the same factors as without, to the fast precision."""
    weight, statistics = layer(out=400, inner=450, dtype=torch.float32)
    monkeypatch.setattr(thresholds, "DENSE_LIMIT", 100)
    plain = solve(name, weight, statistics)
    split: list[object] = []
    of = SplitMatrix.of

    def spy(matrix: Tensor) -> SplitMatrix:
        split.append(matrix.shape)
        return of(matrix)

    for place in (linalg, thresholds):
        monkeypatch.setattr(place, "has_matrix_units", lambda like: True)
    monkeypatch.setattr(SplitMatrix, "of", staticmethod(spy))
    found = solve(name, weight, statistics)
    assert split
    # What an iteration is asked for.
    tolerance = 1e-3 if name == "lora-da" else EACH
    assert angle(found.A.mT, plain.A.mT) < tolerance
    assert relative(product(found), product(plain)) < tolerance


@pytest.mark.parametrize("name", ["natural", "lora-ga"])
def test_leading_digits_do_most_of_the_rounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would not if they were of another matrix: they would lead astray."""
    weight, statistics = layer(out=400, inner=450, dtype=torch.float32)
    monkeypatch.setattr(thresholds, "DENSE_LIMIT", 100)
    for place in (linalg, thresholds):
        monkeypatch.setattr(place, "has_matrix_units", lambda like: True)
    blocks: dict[str, int] = {"first": 0, "all": 0}
    rounds = subspace_iteration._Filter.__call__

    def spy(
        self: subspace_iteration._Filter, apply: subspace_iteration.Apply, vectors: Tensor
    ) -> Tensor:
        before = products["leading"]
        found = rounds(self, apply, vectors)
        blocks["first"] += products["leading"] > before
        blocks["all"] += 1
        return found

    products = {"leading": 0}
    times = Leading.times

    def counted(self: Leading, block: Tensor) -> Tensor:
        products["leading"] += 1
        return times(self, block)

    monkeypatch.setattr(Leading, "times", counted)
    monkeypatch.setattr(subspace_iteration._Filter, "__call__", spy)
    solve(name, weight, statistics)
    assert blocks["first"] >= blocks["all"] / 2 > 0


def test_lora_das_coarse_products_are_its_rough_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ``Omega`` and of ``D D^T``, but for their last digits."""
    weight, statistics = layer(out=400, inner=450, dtype=torch.float32)
    monkeypatch.setattr(thresholds, "DENSE_LIMIT", 100)
    for place in (linalg, thresholds):
        monkeypatch.setattr(place, "has_matrix_units", lambda like: True)
    iterate, errors = linalg.smallest_of_operator, []

    def spy(*args: object, **kwargs: object) -> object:
        block = torch.randn(450, 5, generator=torch.Generator().manual_seed(0))
        errors.append(relative(kwargs["coarse"](block), kwargs["rough"](block)))  # type: ignore[operator]
        return iterate(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(linalg, "smallest_of_operator", spy)
    solve("lora-da", weight, statistics)
    assert len(errors) == 2
    assert all(1e-6 < error < 2e-2 for error in errors)


@pytest.mark.parametrize("method", [LoraDA(), LoraDA.paper()], ids=str)
def test_few_digits_cost_no_accuracy(method: LoraDA, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with ten digits (TF32's): float64 mends what they leave, and says what it is off by."""
    weight, statistics = layer(out=40, inner=800, dtype=torch.float32)
    linalg_rough = linalg.smallest_of_operator
    calls = {"rough": 0, "exact": 0}

    def rounded(block: Tensor) -> Tensor:
        return ((block * 4097) - ((block * 4097) - block)).float()

    def coarse(*args: object, **kwargs: object) -> object:
        apply, rough = args[0], kwargs["rough"]

        def ten_digits(block: Tensor) -> Tensor:
            calls["rough"] += 1
            return rounded(rough(rounded(block)))  # type: ignore[operator]

        def exact(block: Tensor) -> Tensor:
            calls["exact"] += 1
            return apply(block)  # type: ignore[operator, no-any-return]

        return linalg_rough(exact, *args[1:], **{**kwargs, "rough": ten_digits})  # type: ignore[arg-type]

    wanted = solve(method, weight, statistics)
    monkeypatch.setattr(linalg, "smallest_of_operator", coarse)
    found = solve(method, weight, statistics)
    assert calls["rough"] > 0
    assert calls["exact"] > 0
    assert angle(found.A.mT, wanted.A.mT) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(METHODS))
def test_layer_without_any_gradient(name: str, dtype: torch.dtype) -> None:
    """An expert that no token reached backwards: finite factors, no displacement, rows to train.

    Methods that give back what quantization took do so as if all outputs counted alike.
    """
    weight, statistics = layer(dtype=dtype)
    took = getattr(METHODS[name](), "needs_reference", False)
    silent = dataclasses.replace(
        statistics,
        gradient_sum=torch.zeros_like(statistics.gradient_sum),  # type: ignore[arg-type]
        output_second_moment_sum=torch.zeros(OUT, OUT, dtype=dtype),
    )
    found = solve(name, weight, silent)
    assert bool(found.A.isfinite().all())
    assert bool(found.B.isfinite().all())
    assert float(found.A.norm()) > 0
    if took:
        alike = dataclasses.replace(silent, output_second_moment_sum=torch.eye(OUT, dtype=dtype))
        assert relative(product(found), product(solve(name, weight, alike))) < 1e-5
    # Init[AB] displaces by noise, whatever the data.
    elif not found.anchored and name != "init-ab":
        assert float(product(found).norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_silent_layer_spoils_no_other_of_its_stack(dtype: torch.dtype) -> None:
    """800 inputs: the layer with a gradient gets what it gets alone."""
    weight, statistics = layer(out=40, inner=800, dtype=dtype)
    silent = dataclasses.replace(
        statistics,
        gradient_sum=torch.zeros_like(statistics.gradient_sum),  # type: ignore[arg-type]
    )
    alone = solve("lora-da", weight, statistics)
    stack = LayerStatistics.stack([statistics, silent])
    found = LoraDA().solve(torch.stack([weight, weight]), stack, RANK, 1.0)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-3
    assert angle(found.A[0].mT, alone.A.mT) < tolerance
    assert bool(found.A.isfinite().all())
    assert float(found.B[1].norm()) == 0


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_eva_leaves_the_statistics_alone(shared: bool) -> None:
    """The inputs' mean is taken out of a copy, in place; once for layers that share an input."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 50, 12, generator=rng, dtype=torch.float64) + 2
    layers = [
        LayerStatistics(
            input_second_moment_sum=x.mT @ x, input_sum=x.sum(0), positions=float(len(x))
        )
        for x in inputs
    ]
    weight = torch.zeros(20, 12, dtype=torch.float64)
    alone = [EVA().solve(weight, layer, 4, 1.0).A for layer in layers]
    if shared:
        stack = LayerStatistics.stack([layers[i // 2] for i in range(6)], sharing=2)
        weights, wanted = weight.expand(3, 2, 20, 12), torch.stack(alone).unsqueeze(1)
    else:
        stack = LayerStatistics.stack(layers)
        weights, wanted = weight.expand(3, 20, 12), torch.stack(alone)
    before = stack.input_second_moment_sum.clone()
    found = EVA().solve(weights, stack, 4, 1.0).A
    torch.testing.assert_close(found, wanted.expand_as(found), rtol=0, atol=1e-10)
    assert torch.equal(stack.input_second_moment_sum, before)
    for x, a in zip(inputs, alone, strict=True):
        covariance = torch.cov(x.mT, correction=0)
        _values, vectors = torch.linalg.eigh(covariance)
        assert angle(a.mT, vectors[:, -4:]) < 1e-8
