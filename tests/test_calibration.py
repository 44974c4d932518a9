"""The search for a length along a line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lorainit.calibration import search_length


def bowl(best: float, depth: float = 1.0, base: float = 3.0) -> Callable[[float], float]:
    """Falls from `base` by `depth` at `best`, and rises without bound beyond."""
    return lambda t: base + depth * ((t / best - 1) ** 2 - 1)


@pytest.mark.parametrize("off", [1e-6, 1e-2, 0.3, 1.0, 5.0, 1e3])
def test_finds_the_minimum_from_afar(off: float) -> None:
    result = search_length(bowl(0.02), 0.02 * off, precision=0.05, max_trials=40)
    assert result.length == pytest.approx(0.02, rel=0.05)
    assert result.loss == pytest.approx(2.0, abs=3e-3)
    assert result.start_loss == 3.0


def test_a_finer_precision_comes_nearer() -> None:
    coarse, fine = (
        search_length(bowl(0.0317), 0.01, precision=p, max_trials=60) for p in (1.0, 0.01)
    )
    assert abs(fine.length / 0.0317 - 1) < 0.01 < abs(coarse.length / 0.0317 - 1) < 1.0
    assert len(fine.trials) > len(coarse.trials)


def test_never_worse_than_the_start() -> None:
    """Every step hurts: the length is zero."""
    result = search_length(lambda t: 1.0 + t, 0.1)
    assert result.length == 0.0
    assert result.loss == result.start_loss == 1.0
    assert min(t for t, _ in result.trials) < 1e-5


def test_the_best_of_two_minima_in_reach() -> None:
    """A walk downhill from the first trial would end in the nearer, shallower one."""

    def loss(t: float) -> float:
        return (
            3.0
            - math.exp(-((math.log(t / 0.1) / 0.5) ** 2))
            - 2 * math.exp(-((math.log(t / 0.1 / 16) / 0.5) ** 2))
        )

    result = search_length(lambda t: 3.0 if t == 0 else loss(t), 0.1, max_trials=40)
    assert result.length == pytest.approx(1.6, rel=0.2)
    narrow = search_length(lambda t: 3.0 if t == 0 else loss(t), 0.1, max_trials=40, scan=1)
    assert narrow.length == pytest.approx(0.1, rel=0.2)


def two_minima(shorter: float, longer: float) -> Callable[[float], float]:
    """One at 0.1 / 16 and one at 0.1, so deep."""

    def loss(t: float) -> float:
        deep = ((0.1 / 16, shorter), (0.1, longer))
        return 3.0 - sum(depth * math.exp(-((math.log(t / at) / 0.5) ** 2)) for at, depth in deep)

    return loss


@pytest.mark.parametrize(("shorter", "best"), [(2.0, 0.1 / 16), (0.5, 0.1)])
def test_a_shorter_minimum_is_seen_from_beyond_it(shorter: float, best: float) -> None:
    result = search_length(two_minima(shorter, 1.0), 0.1, start_loss=3.0, max_trials=40)
    assert result.length == pytest.approx(best, rel=0.2)


@pytest.mark.parametrize(("far", "skipped"), [(1e-3, True), (0.02, True), (0.3, False)])
def test_shorter_lengths_are_not_scanned_where_the_loss_is_a_line(
    far: float, skipped: bool
) -> None:
    """Far below the best length a quarter of it gains a quarter."""
    result = search_length(bowl(1.0), far, start_loss=3.0, precision=0.05, max_trials=40)
    assert result.length == pytest.approx(1.0, rel=0.05)
    assert (min(length for length, _ in result.trials) == far) == skipped


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lengths_at_which_the_model_breaks(bad: float) -> None:
    result = search_length(lambda t: bad if t > 0.05 else bowl(0.04)(t), 10.0, max_trials=40)
    assert result.length == pytest.approx(0.04, rel=0.15)
    assert all(not math.isnan(value) for _, value in result.trials)


def test_known_start_is_not_measured_again() -> None:
    asked: list[float] = []

    def loss(t: float) -> float:
        asked.append(t)
        return bowl(1.0)(t)

    result = search_length(loss, 1.0, start_loss=3.0, max_trials=9)
    assert 0.0 not in asked
    assert len(asked) == len(set(asked)) == len(result.trials) <= 9


@pytest.mark.parametrize("first", [0.0, -1.0, math.nan, math.inf])
def test_first_length_must_be_a_length(first: float) -> None:
    with pytest.raises(ValueError, match="first length"):
        search_length(bowl(1.0), first)


def test_broken_before_any_step() -> None:
    with pytest.raises(ValueError, match="before any step"):
        search_length(lambda t: math.nan, 1.0)


def test_no_way_down_is_given_up_before_all_trials() -> None:
    """A step that is 16,000 times shorter than the guess brings nothing that anyone could use."""
    result = search_length(lambda t: 1.0 + t, 0.1, max_trials=40)
    assert (result.length, result.loss) == (0.0, 1.0)
    assert len(result.trials) == 10
    assert min(length for length, _ in result.trials) == pytest.approx(0.1 / 4**7)
