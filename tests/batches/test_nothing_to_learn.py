"""Sequences of which every label is masked do not count, and their number is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from lorainit.data import load_batches
from lorainit.errors import DataError
from tests.batches.same import collected, difference, start_difference, started
from tests.batches.test_packed import Row, examples, packed
from tests.life.words import tokenizer
from tests.statistics.models import llama


def masked(rows: list[Row], which: set[int]) -> list[Row]:
    return [
        row | {"labels": torch.full_like(row["labels"], -100)} if i in which else row
        for i, row in enumerate(rows)
    ]


def test_they_use_up_nothing_of_the_cap(caplog: pytest.LogCaptureFixture) -> None:
    rows = examples(12)
    data = masked(rows, {0, 2, 3, 5})
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(llama(), data, max_sequences=6)
    assert "4 of 10 sequences have nothing to learn" in caplog.text
    assert found.metadata["sequences"] == 6
    truth = [rows[i] for i in (1, 4, 6, 7, 8, 9)]
    assert difference(found, collected(llama(), truth)) == 0


def test_nor_of_the_share_that_is_held_back() -> None:
    rows = examples(15)
    data = masked(rows, {1, 4, 9})
    assert start_difference(started(llama, data), started(llama, rows)) > 1e-3
    left = [row for i, row in enumerate(rows) if i not in {1, 4, 9}]
    assert start_difference(started(llama, data), started(llama, left)) == 0


def test_packed_sequences_count_one_by_one() -> None:
    rows = examples(7)
    found = collected(llama(), [packed(masked(rows, {0, 3}))])
    left = [row for i, row in enumerate(rows) if i not in {0, 3}]
    assert found.metadata["sequences"] == 5
    assert difference(found, collected(llama(), left)) < 1e-5


def test_a_label_that_nothing_predicts_teaches_nothing() -> None:
    """The first token's of a causal language model."""
    rows = examples(4)
    first = rows[1]["labels"].masked_fill(torch.arange(rows[1]["labels"].shape[1]) > 0, -100)
    data = [rows[0], rows[1] | {"labels": first}, *rows[2:]]
    assert difference(collected(llama(), data), collected(llama(), [rows[0], *rows[2:]])) == 0


def test_where_nothing_is_left_it_is_an_error() -> None:
    with pytest.raises(DataError, match="every label is masked"):
        collected(llama(), masked(examples(3), {0, 1, 2}))
    # Statistics of inputs need no labels.
    collected(llama(), masked(examples(3), {0, 1, 2}), needs=["input_second_moment"])


def test_answers_that_a_maximal_length_cuts_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"prompt": "w1 " * 9, "completion": f"w{i} w2"} for i in range(11)]
    lines.append({"prompt": "w3 ", "completion": "w4 w5"})
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = load_batches(file, tokenizer(), max_length=8, seed=None)
    model = llama(vocab_size=len(tokenizer()))
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(model, data)
    assert "11 of 12 sequences have nothing to learn" in caplog.text
    assert "maximal length" in caplog.text
    assert found.metadata["sequences"] == 1
