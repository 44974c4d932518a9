"""The search of one step: its length, and how many of its directions it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.calibration.line_search import SearchResult
from lorainit.calibration.paired import SequenceLosses
from lorainit.calibration.repeated_steps import RepeatedSteps
from tests.adapters.tiny import config, llama

BASE, SEQUENCES = 3.0, 12


@dataclass
class Bowls:
    """A loss that falls by some depth at some length, both by the number of directions.

    Attributes:
        bowls: best length and depth.
        asked: lengths and numbers of directions, in order.
    """

    bowls: Mapping[int, tuple[float, float]]
    asked: list[tuple[float, int]] = field(default_factory=list)
    _value: float = BASE

    def __call__(self, at: Any) -> float:
        self._value = BASE
        if at:
            self.asked.append(at)
            best, depth = self.bowls[at[1]]
            self._value += depth * ((at[0] / best - 1) ** 2 - 1)
        return self._value

    def of_some(self, base: float) -> Bowls:
        return self

    @property
    def latest(self) -> SequenceLosses:
        return SequenceLosses(torch.full((SEQUENCES,), self._value), SEQUENCES, SEQUENCES)


def searched(
    loss: Bowls, first: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[SearchResult, int]:
    steps = RepeatedSteps(lorainit.Natural(), match_targets(llama(), config(r=4)).layers)
    monkeypatch.setattr(steps, "_moved", lambda length, directions: (length, directions))
    monkeypatch.setattr(steps, "_first_length", lambda directions: first)
    result: Any = steps._search(loss)  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("first", [1e-3, 0.02, 0.25, 0.4, 1.0, 3.0])
@pytest.mark.parametrize(
    ("bowls", "wanted"),
    [
        ({1: (1.4, 0.5), 2: (1.0, 1.0), 4: (0.7, 1.5)}, 4),
        ({1: (1.4, 1.5), 2: (1.0, 1.0), 4: (0.7, 0.5)}, 1),
        ({1: (1.4, 0.5), 2: (1.0, 1.0), 4: (0.7, 0.5)}, 2),
        # With more directions the same length is better than a shorter one, and that is seen.
        ({1: (1.4, 0.5), 2: (1.0, 1.0), 4: (1.2, 1.3)}, 4),
    ],
)
def test_the_best_number_of_directions_near_its_best_length(
    bowls: dict[int, tuple[float, float]],
    wanted: int,
    first: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = Bowls(bowls)
    result, directions = searched(loss, first, monkeypatch)
    assert directions == wanted
    assert BASE - result.loss > 0.95 * bowls[wanted][1]
    assert len(result.trials) < 17


def test_directions_that_bring_something_at_once_are_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And then at two lengths beside the one found."""
    loss = Bowls({1: (1.4, 0.5), 2: (1.0, 1.0), 4: (0.7, 1.5)})
    searched(loss, 0.25, monkeypatch)
    length, other = (
        [length for length, directions in loss.asked if directions == n] for n in (4, 1)
    )
    assert not other
    assert len(length) == 3
    assert sorted(x / length[0] for x in length) == pytest.approx([0.5**0.5, 1.0, 2**0.5])
