"""One to three processes find what one finds alone, wrapped and sharded as people do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.types import STATISTICS
from tests.distributed import scenarios
from tests.distributed.launch import GROUP_TIMEOUT, Failed, launch, succeeded
from tests.statistics import models
from tests.statistics.models import batches

# Each kind and number of processes in seconds; the rest of the table in minutes.
QUICK = {("fsdp", 1), ("ddp", 2), ("fsdp", 2), ("plain", 3)}
QUICK_STARTS = {("ddp", 2), ("fsdp_after", 2), ("fsdp_adapter", 2), ("plain", 3)}


def table(kinds: list[str], quick: set[tuple[str, int]]) -> list[Any]:
    return [
        pytest.param(size, kind, marks=[] if (kind, size) in quick else pytest.mark.slow)
        for size in (1, 2, 3)
        for kind in kinds
    ]


KINDS = ["plain", "ddp", "fsdp"]
NAMES = list(scenarios.METHODS)


def close(found: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(other)
    for key, value in found.items():
        scale = float(other[key].double().norm()) or 1.0
        assert float((value.double() - other[key].double()).norm()) <= tolerance * scale, key


@pytest.fixture(scope="module")
def alone() -> Any:
    """Statistics of one process without a group, and starts with their loss curves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        statistics = lorainit.collect_statistics(
            models.llama(),
            scenarios.config(),
            data=batches(scenarios.RAGGED, 2),
            needs=STATISTICS,
            progress=False,
        )
        starts = scenarios.starts(0, 1, "plain", NAMES)
    return scenarios.plain(statistics), starts


@pytest.mark.parametrize(("size", "kind"), table(KINDS, QUICK))
def test_statistics(size: int, kind: str, alone: Any, tmp_path: Path) -> None:
    results = succeeded(launch(scenarios.statistics_of_splits, size, tmp_path, kind))
    for split in range(len(results[0]) - 1):
        for name, layer in alone[0].items():
            close(results[0][split][name], layer, 1e-5)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            for name, layer in mine.items():
                assert all(torch.equal(value, theirs[name][key]) for key, value in layer.items())


def test_statistics_block_by_block(alone: Any, tmp_path: Path) -> None:
    """Each process runs its own batches through a block before the sums of the block are added."""
    results = succeeded(launch(scenarios.statistics_by_blocks, 2, tmp_path, scenarios.SPLITS[2][0]))
    for found in results:
        for name, layer in alone[0].items():
            close(found[name], layer, 1e-5)


@pytest.mark.parametrize(
    ("size", "kind"), table([*KINDS, "fsdp_after", "fsdp_adapter"], QUICK_STARTS)
)
def test_starts_and_curves(size: int, kind: str, alone: Any, tmp_path: Path) -> None:
    # Every method without a wrapper, and from shards on three processes; else one of each kind of method.
    # DDP is taken off before a start, and what is sharded after one was started without a wrapper.
    every = kind == "plain" or (size == 3 and kind in ("fsdp", "fsdp_adapter"))
    names = NAMES if every else ["lora_da", "filet", "natural"]
    results = succeeded(launch(scenarios.starts, size, tmp_path, kind, names))
    for name in names:
        start, curve = results[0][name]
        for other in results[1:]:
            assert all(torch.equal(value, other[name][0][key]) for key, value in start.items())
            assert other[name][1] == curve
        if name in ("vanilla", "auto"):
            assert not any(value.any() for key, value in start.items() if "lora_B" in key)
            continue  # PEFT's own random numbers; the same on all processes
        one_start, one_curve = alone[1][name]
        if name == "natural":
            # A direction that it does not use is any direction: only the product is determined.
            close(products(start), products(one_start), 1e-2)
            assert curve == pytest.approx(one_curve, rel=1e-2)
        else:
            close(start, one_start, 1e-3)
            assert curve == pytest.approx(one_curve, rel=1e-4)


def products(start: dict[str, Tensor]) -> dict[str, Tensor]:
    """``B A`` of every layer."""
    return {
        key: start[key.replace("lora_A", "lora_B")] @ value
        for key, value in start.items()
        if "lora_A" in key
    }


@pytest.mark.parametrize(
    ("split", "cap", "total", "drawn"),
    [
        ([3, 3, 3], 6, 6, [2, 2, 2]),
        ([3, 3, 3], 2, 2, [1, 1, 0]),
        ([7, 1, 1], 8, 8, [6, 1, 1]),
        ([9, 0, 0], 5, 5, [5, 0, 0]),
        ([3, 3, 3], 100, 9, [3, 3, 3]),
    ],
)
def test_cap_is_over_all(
    split: list[int], cap: int, total: int, drawn: list[int], tmp_path: Path
) -> None:
    results = succeeded(launch(scenarios.caps, 3, tmp_path, split, cap))
    assert [count for count, _ in results] == [total] * 3
    assert [number for _, number in results] == drawn


@pytest.mark.parametrize("size", [2, 3])
def test_data_that_fails_on_one(size: int, tmp_path: Path) -> None:
    *others, failed = launch(scenarios.failing_data, size, tmp_path, "raises")
    assert (failed.kind, failed.text) == ("OSError", "the disk is gone")
    for other in others:
        assert isinstance(other, Failed)
        assert other.kind == "ProcessError"
        assert f"process {size - 1} failed" in other.text
        assert "the disk is gone" in other.text


def test_process_that_dies(tmp_path: Path) -> None:
    # The launch fails the test if they do not end within the group's time-out.
    *others, dead = launch(scenarios.failing_data, 3, tmp_path, "dies", timeout=GROUP_TIMEOUT)
    assert dead is None
    assert all(isinstance(other, Failed) for other in others)


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_loss_that_fails_on_one(kind: str, tmp_path: Path) -> None:
    first, second = succeeded(launch(scenarios.failing_loss, 2, tmp_path, kind))
    assert first.startswith("NonFiniteError")
    assert second.startswith("ProcessError: process 0 failed")


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_sequences_that_are_skipped_on_one(kind: str, tmp_path: Path) -> None:
    """A sharded model's processes go through as many rounds as the one that has rows left over."""
    (alone, dropped), *_ = succeeded(launch(scenarios.skipping, 1, tmp_path / "1", "plain"))
    assert dropped == 2
    for found, skipped in succeeded(launch(scenarios.skipping, 2, tmp_path / "2", kind)):
        assert skipped == 2
        for name, layer in alone.items():
            close(found[name], layer, 1e-5)


@pytest.mark.parametrize("kind", ["plain", "fsdp"])
def test_solve_that_fails_on_one(kind: str, tmp_path: Path) -> None:
    results = succeeded(launch(scenarios.failing_solve, 3, tmp_path, kind))
    assert all("FactorizationError" in text and "self_attn" in text for text in results)


def test_what_quantization_took_is_given_back_alike(tmp_path: Path) -> None:
    """Two processes, each with its part of the layers: the same factors on both, and those of one alone."""
    first, second = succeeded(launch(scenarios.given_back, 2, tmp_path))
    alone = scenarios.given_back(0, 1)
    for method, factors in first.items():
        for key, value in factors.items():
            assert torch.equal(value, second[method][key])
        # What is held back differs with the number of processes, and with it what Auto measures.
        if method != "Auto":
            close(factors, alone[method], 1e-3)


def test_different_weights_are_refused(tmp_path: Path) -> None:
    for result in launch(scenarios.different_weights, 2, tmp_path):
        assert isinstance(result, Failed)
        assert "different base weights" in result.text


def test_one_process_by_itself(tmp_path: Path) -> None:
    assert succeeded(launch(scenarios.by_oneself, 2, tmp_path)) == [9.0, 0.0]


def test_anchor_over_a_sharded_adapter(tmp_path: Path) -> None:
    first, second = succeeded(launch(scenarios.anchored_over_shards, 2, tmp_path))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_anchor_over_a_factor_sharded_by_itself_is_refused(tmp_path: Path) -> None:
    for result in launch(scenarios.factor_sharded_by_itself, 2, tmp_path):
        assert isinstance(result, Failed)
        assert "by itself" in result.text


def test_a_learning_rate_is_suggested_together(tmp_path: Path) -> None:
    """The same on all processes, and what one process suggests of all their sequences."""
    (alone,) = succeeded(launch(scenarios.rate_of_a_start, 1, tmp_path / "1", [16]))
    # Control: of other sequences it is another.
    (fewer,) = succeeded(launch(scenarios.rate_of_a_start, 1, tmp_path / "0", [8]))
    assert fewer.start_loss != pytest.approx(alone.start_loss, rel=1e-4)
    for counts in ([10, 6], [16, 0]):
        first, second = succeeded(launch(scenarios.rate_of_a_start, 2, tmp_path / "2", counts))
        assert first == second
        assert first.sequences == alone.sequences == 8
        assert first.start_loss == pytest.approx(alone.start_loss, rel=1e-5)
        assert first.two_steps == pytest.approx(alone.two_steps, rel=1e-3)


def test_a_bad_sequence_of_one_process_ends_the_suggestion_on_all(tmp_path: Path) -> None:
    """None goes on alone, which would wait for the others."""
    first, second = launch(scenarios.rate_of_a_bad_sequence, 2, tmp_path)
    assert isinstance(first, Failed)
    assert isinstance(second, Failed)
    assert "is not finite" in second.text


def test_a_start_is_matched_to_a_rate_together(tmp_path: Path) -> None:
    ((alone, alpha, k, measured),) = succeeded(
        launch(scenarios.matched_start, 1, tmp_path / "1", [16])
    )
    assert k != 1
    for counts in ([10, 6], [16, 0]):
        first, second = succeeded(launch(scenarios.matched_start, 2, tmp_path / "2", counts))
        assert first[1:] == second[1:]
        assert first[1] == pytest.approx(alpha, rel=1e-2)
        assert first[3]["learning_rate"] == measured["learning_rate"] == 1e-4
        for name, value in first[0].items():
            assert torch.equal(value, second[0][name]), name
            torch.testing.assert_close(value, alone[name], rtol=1e-2, atol=1e-6)


def test_an_adapter_over_shards_is_matched_as_a_whole_one(tmp_path: Path) -> None:
    (alone,) = succeeded(launch(scenarios.matched_shards, 1, tmp_path / "1"))
    for found in succeeded(launch(scenarios.matched_shards, 2, tmp_path / "2")):
        assert found.keys() == alone.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_a_new_head_is_fitted_together(tmp_path: Path) -> None:
    """One process's head, and start, to the arithmetic of sums; and the same bits on all."""
    ((alone, known, _),) = succeeded(launch(scenarios.fitted_heads, 1, tmp_path / "1", [60]))
    assert known["fitted"] == ["classifier"]
    for counts in ([40, 20], [60, 0]):
        first, second = succeeded(launch(scenarios.fitted_heads, 2, tmp_path / "2", counts))
        assert first[1] == second[1]
        for name, value in first[0].items():
            assert torch.equal(value, second[0][name]), name
        # What is left of the loss is small, and so are its gradients.
        close(first[0], alone, 2e-2)
        assert first[1]["loss_after"] == pytest.approx(known["loss_after"], rel=1e-3)


def test_statistics_take_a_part_of_what_heads_see_on_all_processes(tmp_path: Path) -> None:
    run = scenarios.fitted_heads
    ((alone, known, _),) = succeeded(launch(run, 1, tmp_path / "1", [60], 20))
    for counts, same in (([40, 20], False), ([60, 0], True)):
        first, second = succeeded(launch(run, 2, tmp_path / "2", counts, 20))
        assert (first[2], second[2]) == (20.0, 20.0)
        assert first[1]["sequences"] == known["sequences"] == 12
        for name, value in first[0].items():
            assert torch.equal(value, second[0][name]), name
        if same:
            # The first process has all of them, and takes those that one process takes.
            close(first[0], alone, 2e-2)
