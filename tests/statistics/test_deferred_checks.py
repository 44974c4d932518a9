"""Losses checked later, as on CUDA: what is named, left out and counted is the same."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import lorainit
from lorainit.data.batch import Batch
from lorainit.errors import NonFiniteError
from lorainit.statistics.collect import passes
from lorainit.statistics.loss.nonfinite import DeferredChecks
from lorainit.statistics.memory import planner
from lorainit.statistics.memory.plan import BatchSize
from tests.statistics import models
from tests.statistics.models import all_linear, batches, sequences
from tests.statistics.test_store import assert_equal


def spoiled(model, batch) -> torch.Tensor:
    """A loss that is not finite for sequences that begin with token 7."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = logits.float().logsumexp(-1).mean(-1)
    return losses * torch.where(batch["input_ids"][:, 0] == 7, torch.nan, 1.0)


def rows():
    parts = batches(sequences(), 3)
    for part in parts:
        part["input_ids"][:, 0] = 5
    parts[1]["input_ids"][1, 0] = 7
    return parts


def found(loss_fn=spoiled, **options):
    return lorainit.collect_statistics(
        models.llama(),
        all_linear(),
        data=rows(),
        needs=lorainit.LoraDA().needs,
        loss_fn=loss_fn,
        progress=False,
        **options,
    )


def check_later(monkeypatch) -> None:
    monkeypatch.setattr(passes, "checks_at_once", lambda device: False)


def test_what_is_left_out_is_the_same(monkeypatch, caplog) -> None:
    at_once = found(on_nonfinite="skip")
    check_later(monkeypatch)
    with caplog.at_level(logging.INFO, logger="lorainit"):
        late = found(on_nonfinite="skip")
    assert "beginning again" in caplog.text
    assert late.metadata["skipped_sequences"] == 1
    assert_equal(late, at_once)
    assert late.metadata == at_once.metadata


def test_the_batch_is_named(monkeypatch) -> None:
    check_later(monkeypatch)
    with pytest.raises(NonFiniteError, match=r"batch 1 is not finite \(sequences \[1\]"):
        found()


def test_the_batch_is_named_as_it_came_though_it_was_cut(monkeypatch) -> None:
    check_later(monkeypatch)
    made = planner.make_plan
    monkeypatch.setattr(
        planner, "make_plan", lambda *_, **how: replace(made(*_, **how), batch=BatchSize(1, 1, 0))
    )
    with pytest.raises(NonFiniteError, match=r"batch 1 is not finite \(sequences \[1\]"):
        found(max_memory="8GiB")


def test_late_and_at_once_agree_where_all_is_finite(monkeypatch, caplog) -> None:
    at_once = found(loss_fn=None)
    check_later(monkeypatch)
    with caplog.at_level(logging.INFO, logger="lorainit"):
        assert_equal(found(loss_fn=None), at_once)
    assert "beginning again" not in caplog.text


def test_deferred_checks_come_in_order_and_once() -> None:
    parts = [Batch({"input_ids": torch.zeros(2, 1)}, i) for i in range(3)]
    checks = DeferredChecks()
    for part, second in zip(parts, (1.0, torch.inf, torch.nan), strict=True):
        checks.add(part, torch.tensor([0.0, second]))
    assert checks.bad() is None  # nothing is waited for
    first, again, none = (checks.bad(wait=True) for _ in range(3))
    assert first is not None
    assert again is not None
    assert (first[0].index, again[0].index, none) == (1, 2, None)
    assert first[1].tolist() == [True, False]
