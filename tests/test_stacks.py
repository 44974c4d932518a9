"""Which layers are solved together, in what memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorainit.adapters.targets import Target
from lorainit.linalg import leading, split_precision, thresholds
from lorainit.linalg.split_precision import Leading, SplitMatrix
from lorainit.methods import EVA, LoraDA, LoraGA, LoraOne
from lorainit.pipeline import start
from lorainit.solve import stacks
from lorainit.solve.stacks import more_than_there_is, stacks_of
from lorainit.statistics import Statistics
from lorainit.statistics.memory.peak import LiveBytes
from lorainit.types import LayerSpec, LayerStatistics

OUT, INNER = 32, 16
ONCE, EACH = 4 * INNER * INNER, 4 * OUT * INNER
"""Bytes of the second moment of an input, and of a layer's weight or gradient."""

SIX = [f"{block}.{name}" for block in "01" for name in "qkv"]


def targets_of(names: list[str]) -> dict[str, Target]:
    return {
        name: Target(LayerSpec(name, OUT, INNER, 2, 1.0), nn.Linear(INNER, OUT)) for name in names
    }


def shared_by_three() -> Statistics:
    """Two blocks of three layers that read one input."""
    layers = {}
    for block in "01":
        moment = torch.eye(INNER)
        for name in "qkv":
            layers[f"{block}.{name}"] = LayerStatistics(input_second_moment_sum=moment)
    return Statistics(layers, {})


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [
        # The input's moment counts once for all that read it.
        (3 * EACH + ONCE, [3, 3]),
        (3 * EACH + ONCE - 1, [2, 2, 2]),
        (2 * (3 * EACH + ONCE), [6]),
        (1, [1] * 6),
    ],
)
def test_what_is_shared_counts_once(budget: int, sizes: list[int]) -> None:
    needs = frozenset({"input_second_moment"})
    found = list(stacks_of(targets_of(SIX), budget, needs, shared_by_three()))
    assert [len(chunk) for chunk in found] == sizes
    assert [target.name for chunk in found for target in chunk] == SIX


def test_layers_that_share_nothing_count_each() -> None:
    needs = frozenset({"input_second_moment"})
    found = list(stacks_of(targets_of(SIX), 2 * (EACH + ONCE), needs))
    assert [len(chunk) for chunk in found] == [2, 2, 2]


def test_a_processor_solves_what_fits_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory there is; layers that share an input are not taken apart for it."""
    needs, plenty = frozenset({"input_second_moment"}), 100 * (EACH + ONCE)
    monkeypatch.setattr(stacks, "_CACHE_BYTES", 2 * (EACH + ONCE))
    found = list(stacks_of(targets_of(SIX), plenty, needs))
    assert [len(chunk) for chunk in found] == [2, 2, 2]
    monkeypatch.setattr(stacks, "_CACHE_BYTES", 1)
    found = list(stacks_of(targets_of(SIX), plenty, needs, shared_by_three()))
    assert [len(chunk) for chunk in found] == [3, 3]
    monkeypatch.setattr(stacks, "_CACHE_BYTES", plenty)
    assert [len(chunk) for chunk in stacks_of(targets_of(SIX), plenty, needs)] == [6]


@pytest.mark.parametrize("method", [LoraGA(), LoraOne(), EVA()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_solve_takes_what_the_method_says(
    dtype: torch.dtype, method: LoraGA | LoraOne | EVA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics that come from the host, their stack, and the split of matrix units included."""
    for place in (leading, thresholds):
        monkeypatch.setattr(place, "on_matrix_units", lambda matrix: True, raising=False)
    # On an accelerator halves are multiplied as they are.
    monkeypatch.setattr(SplitMatrix, "times", lambda self, block: dense @ block)
    monkeypatch.setattr(SplitMatrix, "transposed_times", lambda self, block: dense.mT @ block)
    monkeypatch.setattr(Leading, "gram_times", lambda self, block: dense.mT @ (dense @ block))
    # A slab is small beside a real stack.
    monkeypatch.setattr(split_precision, "_SLAB", 2**14)
    n, count = 1024, 2
    rng = torch.Generator().manual_seed(0)
    fall = torch.arange(1, n + 1).reciprocal()
    gradient = torch.randn(n, n, generator=rng) * fall
    dense = gradient.expand(count, n, n).clone()
    layer = LayerStatistics.from_means(
        gradient=gradient, input_second_moment=torch.diag(fall), input_mean=fall.sqrt() / n
    ).only(method.needs)
    weight = torch.zeros(count, n, n, dtype=dtype)
    unit = sum(stacks.statistic_bytes((n, n), method.needs - {"gradient"}).values()) + 4 * n * n
    fields = {f: t for f in LayerStatistics.TENSORS if (t := getattr(layer, f)) is not None}
    with LiveBytes() as meter:
        moved = [replace(layer, **{f: t.clone() for f, t in fields.items()}) for _ in range(count)]
        method.solve(weight, LayerStatistics.stack(moved), 8, 1.0)
    taken = meter.peak + weight.numel() * weight.element_size()
    assert 0.3 < taken / (method.workspace * unit * count) < 0.95


def test_float64_and_what_says_nothing_get_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a budget; within none, what is free decides."""
    free = 160 * 2**30
    monkeypatch.setattr(stacks, "device_of", lambda target: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    targets, room = targets_of(SIX), 16 * 2**30

    def size(method: object, *, exact: bool = False) -> int:
        return stacks.stack_bytes(targets, method, room + 2**30, exact=exact)  # type: ignore[arg-type]

    assert size(LoraGA()) == room // LoraGA.workspace
    assert size(EVA()) == min(room // EVA.workspace, stacks._ENOUGH_BYTES)
    assert size(LoraGA(), exact=True) == size(LoraDA()) == room // stacks._SHARE_OF_BUDGET
    assert stacks.stack_bytes(targets, LoraGA()) == free // stacks._SHARE_OF_FREE


def test_a_method_that_says_nothing_gets_a_small_share() -> None:
    assert not hasattr(LoraDA, "workspace")
    assert 2 * max(m.workspace for m in (LoraGA, LoraOne, EVA)) <= stacks._SHARE_OF_BUDGET


def test_a_solve_that_does_not_fit_beside_the_model_is_said() -> None:
    """Within 46 GiB, 37 of which a model in four bits takes, a layer of 28,672 inputs does not."""
    size = 2**30
    said = more_than_there_is(37 * size, 17 * size, 46 * size)
    assert said is not None
    for part in ("17 GiB beside 37 GiB", "max_memory (46 GiB)", "Give 54 GiB"):
        assert part in said
    assert more_than_there_is(37 * size, 9 * size, 46 * size) is None


@pytest.mark.parametrize(("budget", "warns"), [(100, True), (1000, False)])
def test_a_start_within_a_budget_says_so_before_its_pass(
    budget: int, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start, "held_bytes", lambda *_: 60)
    settings = SimpleNamespace(budget=budget)
    measurements: Any = SimpleNamespace(
        settings=settings, device=torch.device("cuda"), model=nn.Identity()
    )
    planned: Any = SimpleNamespace(parts=list)
    assert list(start._solvable(planned, measurements, {}, workspace=50)) == []
    assert ("solving the largest layer takes about" in caplog.text) == warns
    # On a processor there is no such budget.
    caplog.clear()
    measurements.device = torch.device("cpu")
    assert list(start._solvable(planned, measurements, {}, workspace=50)) == []
    assert not caplog.text
