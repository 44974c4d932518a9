"""The clocks around a solve's parts count them, and are taken off again."""

from __future__ import annotations

import lorainit.solving
import pytest
import torch
from benchmarks.timing.cases import Case

from benchmarks import solve_parts


@pytest.mark.parametrize("method", ["lora_da", "natural"])
def test_parts_of_a_solve(method):
    before = [getattr(place, name) for place, names in solve_parts.WATCHED for name in names]
    case = Case("parts", "start", "tiny", sequences=4, tokens=16, batch=2, method=method)
    found = solve_parts.measure(case, torch.device("cpu"))
    after = [getattr(place, name) for place, names in solve_parts.WATCHED for name in names]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert lorainit.solving.relative_size in after
    # Seven layers in each of two blocks, and each is asked for its size once.
    assert sum(n for key, n in found["calls"].items() if key.endswith("relative_size")) == 14
    inner = {k: v for k, v in found["seconds"].items() if "/" in k}
    outer = found["seconds"]["_solve_chunk"]
    assert inner
    assert all(0 < seconds <= outer for seconds in inner.values())
    assert outer <= found["watched"][f"solve {method}"]
