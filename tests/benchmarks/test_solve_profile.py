"""The profile counts the package's functions within their callers, and is taken off again."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmarks.common.decoder import Case
from benchmarks.studies.solve_profile import PackageProfile, measure

import lorainit


@pytest.mark.parametrize(("method", "name"), [("lora_da", "LoraDA"), ("natural", "Natural")])
def test_parts_of_a_solve(method, name):
    case = Case("parts", "start", "tiny", sequences=4, tokens=16, batch=2, method=method)
    found = measure(case, torch.device("cpu"))
    assert sys.getprofile() is None
    assert found["seconds"].keys() == found["calls"].keys()
    (whole,) = (s for key, s in found["seconds"].items() if key.split("/")[-1] == "get_peft_model")
    inner = {key: s for key, s in found["seconds"].items() if key.endswith(f"{name}.solve")}
    assert inner
    assert sum(inner.values()) < whole < 1.5 * found["watched"][f"start {method}"]


def test_functions_are_counted_within_their_callers_and_no_others():
    waits = []
    method = lorainit.PiSSA()
    weight = torch.randn(6, 5)
    statistics = lorainit.LayerStatistics(sequences=1, label_tokens=1, positions=1)
    with PackageProfile(lambda: waits.append(1)) as profile:
        torch.linalg.svd(weight)
        method.solve(weight, statistics, 2, 1.0)
        method.solve(weight, statistics, 2, 1.0)
    assert profile.calls["PiSSA.solve"] == 2
    within = {k: s for k, s in profile.seconds.items() if k.startswith("PiSSA.solve/")}
    assert within
    assert all(0 < s < profile.seconds["PiSSA.solve"] for s in within.values())
    assert not any(key == "svd" for key in profile.calls)
    assert len(waits) == 2 * sum(profile.calls.values())
