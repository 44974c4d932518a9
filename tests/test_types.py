"""Statistics and factors as values: sums over counts, stacks, and what is missing said by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorainit
from lorainit.errors import LorainitError, MissingStatisticError
from lorainit.types import STATISTICS, Factors, LayerStatistics, Method, settings_of

OUT, IN = 3, 4


def layer(seed: int = 0, **changes: object) -> LayerStatistics:
    generator = torch.Generator().manual_seed(seed)
    g, x = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (OUT, IN))
    made = LayerStatistics(
        gradient_sum=g.mT @ x,
        input_second_moment_sum=x.mT @ x,
        input_sum=x.sum(0),
        output_second_moment_sum=g.mT @ g,
        sequences=2.0,
        label_tokens=5.0,
        positions=6.0,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_means_are_sums_over_their_own_counts() -> None:
    one = layer()
    assert one.gradient_sum is not None
    assert one.input_sum is not None
    torch.testing.assert_close(one.gradient, one.gradient_sum / 2)
    torch.testing.assert_close(
        dataclasses.replace(one, loss_reduction="token").gradient, one.gradient_sum / 5
    )
    torch.testing.assert_close(one.input_mean, one.input_sum / 6)
    torch.testing.assert_close(
        one.output_second_moment_diagonal, one.output_second_moment.diagonal()
    )


def test_a_wider_statistic_serves_a_narrower_need() -> None:
    assert layer().available == STATISTICS
    narrow = layer().only(frozenset({"output_second_moment_diagonal"}))
    assert narrow.available == {"output_second_moment_diagonal"}
    assert torch.equal(
        narrow.output_second_moment_diagonal, layer().output_second_moment.diagonal()
    )
    with pytest.raises(MissingStatisticError):
        _ = narrow.output_second_moment


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_what_is_missing_is_named(name: str) -> None:
    others = layer().only(
        STATISTICS - {name, "output_second_moment", "output_second_moment_diagonal"}
    )
    with pytest.raises(MissingStatisticError, match=rf"'{name}' was not collected.*needs"):
        getattr(others, name)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 4))
def test_a_stack_is_its_layers(count: int) -> None:
    layers = [layer(i, sequences=float(i + 1), positions=6.0 * (i + 1)) for i in range(count)]
    stack = LayerStatistics.stack(layers)
    for name in STATISTICS:
        whole = getattr(stack, name)
        for index, one in enumerate(layers):
            torch.testing.assert_close(whole[index], getattr(one, name))


def test_a_stack_keeps_populations_only_if_all_know_theirs() -> None:
    known = layer(population=7.0)
    both = LayerStatistics.stack([known, known]).population
    assert isinstance(both, Tensor)
    assert both.tolist() == [7, 7]
    assert LayerStatistics.stack([known, layer()]).population is None


def test_means_from_elsewhere() -> None:
    one = LayerStatistics.from_means(gradient=torch.ones(2, 3), input_mean=torch.ones(3))
    assert torch.equal(one.gradient, torch.ones(2, 3))
    assert one.available == {"gradient", "input_mean"}


def test_no_count_is_not_divided_by() -> None:
    empty = layer(sequences=0.0, positions=0.0)
    assert torch.isfinite(empty.gradient).all()
    assert torch.isfinite(empty.input_second_moment).all()


def test_factors_of_a_stack_come_apart() -> None:
    stack = Factors(torch.ones(2, 1, 3), torch.ones(2, 4, 1), anchored=True)
    assert stack[1].A.shape == (1, 3)
    assert stack[1].B.shape == (4, 1)
    assert stack[1].anchored


def test_values_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer().sequences = 3.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        lorainit.LoraDA().beta = 1.0  # type: ignore[misc]


def test_methods_are_known_by_their_members() -> None:
    assert isinstance(lorainit.LoraDA(), Method)
    assert not isinstance(object(), Method)
    assert settings_of(lorainit.LoraDA(beta=0.5))["beta"] == 0.5


def test_every_error_is_a_lorainit_error_and_a_builtin_one() -> None:
    from lorainit import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) >= 9
    for kind in kinds:
        assert issubclass(kind, LorainitError)
        # Bad input is a ValueError; another process's failure and a package that is not there are
        # nobody's input here.
        others = {errors.ProcessError: RuntimeError, errors.MissingExtraError: ImportError}
        base = others.get(kind, ValueError)
        assert kind is LorainitError or issubclass(kind, base)
