"""The sweep over architectures: a process an entry, its limits, and what a record comes to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from benchmarks.architectures import __main__ as command
from benchmarks.architectures import numbers, schedule, tables
from benchmarks.architectures.outcome import (
    FOREIGN,
    NOT_ALONE,
    NOT_WITH_PEFT,
    OWN,
    REFUSED,
    SAID,
    STARTS,
    WRONG,
    outcome,
)
from benchmarks.architectures.tiny.families import FAMILIES, entries
from benchmarks.common import json_lines

GOOD: dict[str, Any] = {
    "family": "CTC",
    "name": "some",
    "alone": True,
    "peft": True,
    "numbers": {"truth": {"gradient": ["layer", 1e-6]}, "batching": {"gradient": ["layer", 1e-6]}},
    "starts": {"default": {"faults": []}, "EVA": {"faults": []}},
}
OFF = {"gradient": ["layer", 0.1]}
ERROR = {"error": "ValueError: no", "refused": True, "reproduced": None}


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def figures(**changes: Any) -> dict[str, Any]:
    return changed(numbers={**GOOD["numbers"], **changes})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (GOOD, STARTS),
        (changed(alone="TypeError: no"), NOT_ALONE),
        (changed(peft="TypeError: no"), NOT_WITH_PEFT),
        (changed(harness="TimeoutError: late"), FOREIGN),
        (changed(starts={"EVA": ERROR}), REFUSED),
        (changed(starts={"EVA": {**ERROR, "refused": False}}), FOREIGN),
        (changed(starts={"EVA": {**ERROR, "refused": False, "reproduced": "model(**row)"}}), OWN),
        (changed(starts={"EVA": {"faults": ["base weights changed"]}}), WRONG),
        (figures(truth=OFF), WRONG),
        (figures(truth={"gradient": ["layer", float("nan")]}), WRONG),
        (figures(truth=OFF, chance=True), OWN),
        (figures(truth=OFF, chance=False, frozen=True), OWN),
        (figures(batching=OFF, padding=1e-7), WRONG),
        (figures(batching=OFF, padding=0.1), STARTS),
        (figures(batching={"positions": ["layer", "9 for 8"]}, padding=0.1), WRONG),
        (figures(batching=OFF, padding=1e-7, said_of_batches=[f"inputs {SAID}"]), STARTS),
        (figures(batched_failure={**ERROR, "refused": False}), FOREIGN),
    ],
)
def test_what_a_record_comes_to(record: dict[str, Any], expected: str) -> None:
    assert outcome(record) == expected


def test_a_number_is_wrong_from_a_thousandth_on() -> None:
    assert numbers.wrong({"gradient": ["layer", 0.9e-3], "inputs": ["layer", 1.1e-3]}) == ["inputs"]
    assert numbers.distance(torch.ones(3), torch.ones(3) * 2) == pytest.approx(0.5)


def test_entries_are_those_of_eleven_mappings() -> None:
    assert len({family for family, _ in entries(FAMILIES, [])}) == 11
    assert ("CTC", "wavlm") in entries(["CTC"], [])
    assert entries(["CTC"], ["wavlm"]) == [("CTC", "wavlm")]


def test_an_entry_runs_once_and_is_shown(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(command, "QUIET", {})
    out = tmp_path / "sweep.jsonl"
    wanted = ["--families", "CAUSAL_LM", "--names", "gpt2"]
    for _ in range(2):
        assert command.main(["--out", str(out), *wanted]) == 0
    provenance, record = json_lines.read(out)
    assert "torch" in provenance["provenance"]
    assert record["outcome"] == STARTS, record
    assert record["batched"]
    assert set(record["starts"]) == {"default", "LoRA-DA", "FILet", "EVA"}
    assert "| CAUSAL_LM | 1 | 1 | 1 | 0 | 1 (100.0%) | 0 | 0 | 0 |" in tables.summary([out])


def test_an_entry_that_hangs_or_dies_is_recorded(monkeypatch) -> None:
    import os
    import time

    def run(family: str, name: str) -> dict[str, Any]:
        if name == "dies":
            os._exit(3)
        time.sleep(60)
        return {}

    monkeypatch.setattr(schedule, "run_entry", run)
    monkeypatch.setattr(schedule, "GRACE", 1)
    names = [("CTC", "dies"), ("CTC", "hangs")]
    found = list(schedule.run_all(names, jobs=2, seconds=1, gib=64))
    assert {r["name"]: r["harness"].split()[-1] for r in found} == {"dies": "3", "hangs": "1"}
    assert {r["outcome"] for r in found} == {FOREIGN}


def test_the_newest_record_of_an_entry_counts(tmp_path) -> None:
    files = [tmp_path / "first.jsonl", tmp_path / "again.jsonl"]
    for number, (path, record) in enumerate(
        zip(files, (changed(starts={"EVA": ERROR}), GOOD), strict=True)
    ):
        json_lines.add({"provenance": {"torch": f"2.{number}"}}, path)
        json_lines.add(record, path)
    assert [r["outcome"] for r in tables.read(files)] == [STARTS]
    assert [r["outcome"] for r in tables.read(files[::-1])] == [REFUSED]
    assert "(1 entries with torch 2.1)" in tables.page(tables.read(files))


def test_the_page_names_what_does_not_start() -> None:
    bad = changed(name="other", starts={"EVA": ERROR}) | {"outcome": REFUSED}
    text = tables.page([GOOD | {"outcome": STARTS}, bad])
    assert "| all | 2 | 2 | 2 | 0 | 1 (50.0%) | 1 | 0 | 0 |" in text
    assert "| CTC `other` | EVA: ValueError: no |" in text
    json.dumps(bad)
