"""What every test starts from: one thread, a fixed random state that it hands back, and clear gains."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorainit.calibration.paired import Gain

torch.set_num_threads(1)

ASKED = ("test_few_sequences", "test_paired")
"""Modules whose tests ask whether a gain is clear over its sequences."""


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module", autouse=True)
def _every_gain_is_clear(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny data hold back a handful of sequences, of which no gain is clear: elsewhere nobody asks."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith(ASKED):
            patch.setattr(Gain, "clear", True)
        yield
