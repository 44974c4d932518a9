"""Paired differences of losses, against the two-sample formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lorainit.calibration.paired import Gain, SequenceLosses, gain, t_quantile


def losses(values: torch.Tensor) -> SequenceLosses:
    return SequenceLosses(values, len(values), len(values))


def test_a_gain_is_the_paired_t_test() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(13, generator=generator, dtype=torch.float64) + 2
    after = before - 0.1 - 0.2 * torch.rand(13, generator=generator, dtype=torch.float64)
    found = gain(losses(before), losses(after))
    expected = stats.ttest_rel(before.numpy(), after.numpy())
    assert found.mean / found.error == pytest.approx(expected.statistic, rel=1e-10)
    assert found.sequences == 13
    # The same losses in another order are no pairs.
    apart = gain(losses(before), losses(after.flip(0)))
    assert apart.mean == pytest.approx(found.mean)
    assert apart.error > 2 * found.error


def test_tokens_weigh_by_their_number() -> None:
    before, after = torch.tensor([6.0, 9.0, 0.0]), torch.tensor([5.0, 8.0, 0.0])
    found = gain(SequenceLosses(before, 2, 10), SequenceLosses(after, 2, 10))
    assert found.mean == pytest.approx(0.2)
    assert found.sequences == 2


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 10, 11, 15, 30, 51, 200, 10000])
def test_quantiles_are_students(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


def test_what_is_clear() -> None:
    assert Gain(0.1, 0.04, 50).clear
    assert not Gain(0.1, 0.04, 3).clear
    assert not Gain(-0.1, 0.01, 50).clear
    assert not Gain(0.1, math.inf, 1).clear
    one = gain(losses(torch.tensor([2.0])), losses(torch.tensor([1.0])))
    assert one.mean == 1.0
    assert one.error == math.inf
    assert not one.clear
    assert not gain(losses(torch.tensor([1.0, 1.0])), losses(torch.tensor([math.nan, 0.5]))).clear
