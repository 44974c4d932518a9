"""Blocks of figures on the pages are what the kept records say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.published import pages
from benchmarks.published.blocks import BLOCKS
from benchmarks.published.sources import Mean


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_no_block_is_stale(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.stale(text) == []
    # A digit that somebody changed by hand is noticed, and put right.
    name = re.search(r"<!-- figures: ([\w-]+) -->", text)
    assert name is not None
    place = re.compile(r"\d(?=%|\])").search(text, name.end())
    assert place is not None
    wrong = text[: place.start()] + str((int(place[0]) + 1) % 10) + text[place.end() :]
    assert pages.stale(wrong) == [name[1]]
    assert pages.with_blocks(wrong) == text


def test_every_block_stands_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages.PAGES)
    assert set(re.findall(r"<!-- figures: ([\w-]+) -->", text)) == set(BLOCKS)


def test_a_mean_says_its_interval() -> None:
    mean = Mean.of([-1.0, 0.0, 1.0])
    # t(0.975, 2) = 4.303, standard error 1 / sqrt(3)
    assert str(mean) == "+0.000 [-2.484, +2.484]"
    assert (mean.below, mean.tasks) == (1, 3)
