"""Files from strangers: each mutation is refused in the package's own words, or still means something."""

from __future__ import annotations

import json

import pytest

from tests.faults.mutations import Subject, fuzz, subjects

NAMES = ("adapter", "statistics", "records", "options", "curves", "base model")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    found = subjects(tmp_path_factory.mktemp("made"))
    assert set(found) == set(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(name: str, every: dict[str, Subject]) -> None:
    refused, broken = fuzz(name, every[name], 60, seed=1)
    assert not broken, "\n".join(broken)
    assert refused > 10


def test_a_foreign_error_is_seen(every: dict[str, Subject]) -> None:
    """The negative control: a reader that checks nothing."""
    whole = every["adapter"]
    name = whole.names[0]
    careless = Subject(whole.folder, [name], lambda p: json.loads((p / name).read_text())["r"] + 1)
    assert fuzz("careless", careless, 30, seed=1)[1]
