"""Starts under a memory limit that one pass does not fit: from batches of several as from single examples."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from lorainit.errors import MemoryPlanError
from lorainit.types.byte_size import parse_bytes
from tests.batches.same import start_difference, started
from tests.batches.test_loss_functions import by_two, dpo, pairs
from tests.batches.test_packed import examples, packed, stacked
from tests.statistics.models import llama


@dataclass(frozen=True)
class Layout:
    """Single examples, and the same in batches of several, of which the same are held back."""

    single: Callable[[], list[Any]]
    several: Callable[[], list[Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def packed_rows() -> list[Any]:
    rows = examples(12)
    parts = [packed(rows[i : i + 3]) for i in range(0, 12, 3)]
    return [stacked(parts[:2]), stacked(parts[2:])]


def padding_free() -> list[Any]:
    rows = examples(12)
    return [packed(rows[:7]), packed(rows[7:])]


def single_pairs() -> list[Any]:
    """Twenty pairs, of which every fifth is one of the fifth and the tenth batch of two."""
    some = pairs(20)
    held = {8, 9, 18, 19}
    kept, back = [i for i in range(20) if i not in held], sorted(held)
    order = [back[i // 5] if i % 5 == 4 else kept[i - i // 5] for i in range(20)]
    return [some[i] for i in order]


LAYOUTS = {
    "packed rows": Layout(lambda: examples(12), packed_rows),
    "padding-free": Layout(lambda: examples(12), padding_free),
    "preference pairs": Layout(single_pairs, lambda: by_two(pairs(20)), {"loss_fn": dpo}),
}


def least(data: list[Any], **settings: Any) -> int:
    """The smallest ``max_memory``, in bytes, by the message about a smaller one."""
    with pytest.raises(MemoryPlanError) as refused:
        started(llama, data, max_memory=1000, **settings)
    (text,) = re.findall(r"Allow ([\d.]+ [MG]iB)", str(refused.value))
    size = parse_bytes(text)
    assert size is not None
    return size


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_start_under_a_memory_limit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    layout = LAYOUTS[name]
    with caplog.at_level(logging.INFO, logger="lorainit"):
        expected = started(llama, layout.single(), **layout.settings)
    assert "passes" not in caplog.text
    assert "block by block" not in caplog.text
    tight = int(1.1 * least(layout.several(), **layout.settings))
    with caplog.at_level(logging.INFO, logger="lorainit"):
        found = started(llama, layout.several(), max_memory=tight, **layout.settings)
    assert "passes" in caplog.text or "block by block" in caplog.text
    assert start_difference(found, expected) < 1e-5
    # The negative control: one example fewer is another start.
    fewer = started(llama, layout.single()[1:], **layout.settings)
    assert start_difference(fewer, expected) > 1e-4
