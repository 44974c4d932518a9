"""The scaling benchmark's comparison by sketches, and its tables from the records that are kept."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks.scaling import __main__ as command
from benchmarks.scaling import projection, sketches, tables


def test_sketches_say_how_far_matrices_are_apart() -> None:
    torch.manual_seed(0)
    first = torch.randn(300, 200, dtype=torch.float64)
    noise = torch.randn(300, 200, dtype=torch.float64)
    for size in (1e-6, 1e-2):
        other = first + size * noise
        found = sketches.distances(
            {"layer gradient": sketches.sketch(other)}, {"layer gradient": sketches.sketch(first)}
        )
        assert found["gradient"]["largest"] == pytest.approx(size, rel=0.5)
    same = {"layer gradient": sketches.sketch(first)}
    assert sketches.distances(same, same)["gradient"]["largest"] == 0
    assert "error" in sketches.distances(same, {"another gradient": sketches.sketch(first)})


def test_tables_of_the_records() -> None:
    records = json.loads(command.RESULTS.read_text())
    known = projection.constants(records)
    # Between what such a card can do and a tenth of it.
    assert 8e13 < known["flops"] < 8e14
    assert known["reduction"] < known["link"]
    text = tables.tables(records)
    for word, kind in (("replicated", "plain"), ("sharded |", "fsdp")):
        measured = [r for r in records if r["processes"] > 1 and r.get("kind") == kind]
        assert text.count(word) == len(measured) >= 2
    # 68.5e9 weights in float32.
    assert projection.gradient_bytes(projection.LARGE) == pytest.approx(274e9, rel=1e-3)
    assert projection.input_bytes(projection.LARGE) == pytest.approx(327e9, rel=2e-3)
