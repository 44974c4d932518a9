"""Files from strangers: each mutation is refused in the package's own words, or still means something."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.mutations import fuzz, subjects

NAMES = ("adapter", "statistics", "records", "options", "curves")


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = subjects(tmp_path_factory.mktemp("made"))
    assert set(found) == set(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(name: str, every: dict[str, Any]) -> None:
    refused, broken = fuzz(name, every[name], 60, seed=1)
    assert not broken, "\n".join(broken)
    assert refused > 10


def test_a_foreign_error_is_seen(every: dict[str, Any]) -> None:
    """The negative control: a reader that checks nothing."""
    import json

    folder, names, _, allowed = every["adapter"]
    careless = (
        folder,
        names[:1],
        lambda p: json.loads((p / names[0]).read_text())["r"] + 1,
        allowed,
    )
    assert fuzz("careless", careless, 30, seed=1)[1]
