"""What is held back of several batches runs in batches as large as theirs, with the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorainit.adapters.targets import match_targets
from lorainit.data.batch import Batch
from lorainit.data.joining import joined
from lorainit.data.sampling import draw_sample
from tests.adapters.tiny import config, llama
from tests.measuring import held_out
from tests.statistics import models

LENGTHS = (5, 9, 7, 7, 4)


def tokens(rows: int, length: int, seed: int, *, masked: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, models.VOCABULARY, (rows, length), generator=generator)
    found = {"input_ids": ids, "labels": ids.clone()}
    return found | {"attention_mask": torch.ones_like(ids)} if masked else found


def arrived(contents: list[Any]) -> list[Batch]:
    return [Batch.arrived(content, i) for i, content in enumerate(contents)]


def losses_of(batches: list[Batch]) -> Tensor:
    model = llama().double()
    modules = {n: t.module for n, t in match_targets(model, config()).layers.items()}
    with held_out(model, modules, [batch.content for batch in batches]).measuring() as loss:
        loss({})
        return loss.latest.losses


def test_losses_are_those_of_the_batches_alone() -> None:
    apart = arrived([tokens(1, length, i) for i, length in enumerate(LENGTHS)])
    together = joined(apart, rows=3, positions=27)
    assert [batch.rows for batch in together] == [3, 2]
    assert [tuple(batch.content["input_ids"].shape) for batch in together] == [(3, 9), (2, 7)]
    torch.testing.assert_close(losses_of(together), losses_of(apart), rtol=1e-12, atol=1e-12)
    # The padding must not count: with labels there the losses are others.
    spoiled = [{**batch.content, "labels": batch.content["input_ids"]} for batch in together]
    other = losses_of(arrived(spoiled))
    assert not torch.allclose(other, losses_of(apart), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "positions", "found"), [(8, 28, [4, 2]), (3, 99, [3, 3]), (1, 99, [1] * 6)]
)
def test_batches_stay_within_their_sizes(rows: int, positions: int, found: list[int]) -> None:
    batches = joined(arrived([tokens(1, 7, i) for i in range(6)]), rows, positions)
    assert [batch.rows for batch in batches] == found
    ids = torch.cat([batch.content["input_ids"] for batch in batches])
    assert torch.equal(ids, torch.cat([tokens(1, 7, i)["input_ids"] for i in range(6)]))


def packed() -> dict[str, Tensor]:
    return tokens(1, 8, 0) | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}


@pytest.mark.parametrize(
    "pair",
    [
        [tokens(2, 5, 0), tokens(2, 5, 1, masked=False)],
        [tokens(2, 5, 0, masked=False), tokens(2, 6, 1, masked=False)],
        [packed(), packed()],
        [tokens(1, 5, 0) | {"scale": 2.0}, tokens(1, 5, 1) | {"scale": 2.0}],
        [
            tokens(1, 5, 0) | {"kind": torch.zeros(1)},
            tokens(1, 5, 1) | {"kind": torch.zeros(1).long()},
        ],
        [
            tokens(1, 5, 0) | {"extra": torch.zeros(1, 2)},
            tokens(1, 6, 1) | {"extra": torch.zeros(1, 3)},
        ],
    ],
    ids=["keys", "lengths without a mask", "packed", "no tensor", "dtypes", "no tokens"],
)
def test_what_does_not_go_together_stays_apart(pair: list[Any]) -> None:
    batches = arrived(pair)
    assert joined(batches, rows=9, positions=99) == batches


def test_what_is_held_back_runs_in_batches_of_the_samples_size() -> None:
    sample = draw_sample([tokens(6, 7, i) for i in range(4)], None)
    kept, held = sample.held_back(1 / 6)
    assert [batch.rows for batch in held.batches] == [4]
    assert sum(batch.rows for batch in kept.batches) == 20
    # Rows that run one by one go on doing so.
    alone = draw_sample([tokens(1, 7, i) for i in range(12)], None)
    assert [batch.rows for batch in alone.held_back(1 / 6)[1].batches] == [1, 1]
