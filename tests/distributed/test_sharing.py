"""Sums to their owners and back, and statistics that are shared out over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorainit.parallel.exchange import balanced_owners
from tests.distributed import scenarios
from tests.distributed.launch import launch, succeeded


@pytest.mark.parametrize(("size", "nbytes"), [(3, 4000), (2, 1 << 20)])
def test_sums_travel_to_their_owners_and_back(size: int, nbytes: int, tmp_path: Path) -> None:
    results = succeeded(launch(scenarios.travelling, size, tmp_path, nbytes))
    for index, (name, (shape, dtype, _)) in enumerate(scenarios.TRAVELLERS.items()):
        parts = [scenarios.traveller(name, rank) for rank in range(size)]
        expected = sum((p for p in parts if p is not None), torch.zeros(shape, dtype=dtype))
        for rank, result in enumerate(results):
            assert (name in result["owned"]) == (rank == index % size)
            torch.testing.assert_close(result["all"][name], expected)
            assert torch.equal(result["all"][name], results[0]["all"][name])


def test_division_is_even() -> None:
    weights = {f"layer {i}": 1 + i % 7 for i in range(60)}
    owners = balanced_owners(weights, 8)
    loads = [sum(w for n, w in weights.items() if owners[n] == part) for part in range(8)]
    assert list(owners) != list(weights)  # the heaviest first
    assert set(owners) == set(weights)
    assert max(loads) - min(loads) <= 1
    assert set(balanced_owners({"a": 1, "b": 1}, 5).values()) <= set(range(5))


def test_statistics_shared_out(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    results = succeeded(launch(scenarios.shared_out, 3, tmp_path / "run", str(kept)))
    whole = results[0]["nbytes"][1]
    assert sum(result["nbytes"][0] for result in results) == whole
    assert max(result["nbytes"][0] for result in results) < whole / 2
    for result in results:
        for number, start in enumerate(result["starts"]):
            # Whole, shared out, and from the file: one method's three starts are one.
            first = results[0]["starts"][number // 3 * 3]
            assert all(torch.equal(value, first[key]) for key, value in start.items())
    for rank, result in enumerate(results):
        elsewhere, unwritten, other = result["messages"]
        assert elsewhere.startswith("KeyError")
        assert "gathered()" in elsewhere
        assert unwritten.startswith("OSError" if rank == 0 else "ProcessError: process 0 failed")
        assert "could not be written" in unwritten or rank
        assert other.startswith("StatisticsFileError")
        assert "save them there" in other


@pytest.mark.parametrize(
    "work", [scenarios.ranked_and_turned, scenarios.ranked_by_error, scenarios.of_one_shape]
)
def test_ranks_and_directions_from_sharded_weights(
    work: Callable[[int, int, str], list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Weights that no process holds whole are gathered for both; all processes and one find the same."""
    with torch.random.fork_rng(devices=[]):
        alone = work(0, 1, "plain")
    results = succeeded(launch(work, 2, tmp_path, "fsdp"))
    for number, wanted in enumerate(alone):
        for result in results:
            found = result[number]
            assert {key: value.shape for key, value in found.items()} == {
                key: value.shape for key, value in wanted.items()
            }
            assert all(torch.equal(v, results[0][number][key]) for key, v in found.items())
            for key, value in found.items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-3, atol=1e-3)
    ranks = {value.shape[0] for key, value in alone[0].items() if "lora_A" in key}
    assert len(ranks) > 1
