"""The map in README.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
SHORT = {"faults": "tests/test_faults.py", "peft": "tests/adapters/test_peft.py"}


def missing(text: str) -> list[str]:
    """Files and tests that the text names, and that are not there; ``::name`` goes on from before."""
    found, place = [], ""
    for quoted in re.findall(r"`([^`]+)`", text):
        match = re.match(r"([\w./]*)::((?:Test\w+::)?\w+\*?)", quoted)
        if match is None:
            continue
        place = match[1] or place
        path = HERE.parents[1] / SHORT.get(place, place)
        if "/" not in place and place not in SHORT:
            path = HERE / f"{place.removesuffix('.py')}.py"
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not all(re.search(rf"(def|class) {name}\b", source) for name in match[2].split("::")):
            found.append(f"{path.name}::{match[2]}")
    return found


def test_every_test_of_the_map_is_there() -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert text.count("::") > 70
    assert not missing(text)
    assert missing("`test_sft::test_nothing` `::test_gradient_checkpointing`") == [
        "test_sft.py::test_nothing"
    ]
