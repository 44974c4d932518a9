"""Convolutions and embeddings over two processes: what one process finds on all the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorainit
from lorainit.adapters.wrappers import unwrapped
from tests.adapters import tiny
from tests.distributed import layer_scenarios
from tests.distributed.launch import launch, succeeded


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The words that each saw are others; the control is one process's own sequences."""
    alone, factors = layer_scenarios.started(0, 1)
    half, other = layer_scenarios.started(0, 2)
    (first, mine), (second, theirs) = succeeded(launch(layer_scenarios.started, 2, tmp_path))
    assert first["counts"] == second["counts"] == alone["counts"]
    assert half["counts"] != alone["counts"]
    counts = [key for key in alone["sums"] if key.endswith("input_counts")]
    assert len(counts) == 1
    for key, tensor in alone["sums"].items():
        for found in (first, second):
            torch.testing.assert_close(found["sums"][key], tensor, rtol=1e-5, atol=1e-8)
    for name, value in factors.items():
        assert torch.equal(mine[name], theirs[name])
        if "lora_embedding_A" in name or "lora_A" in name:
            # Signs are fixed; vectors agree as far as sums do.
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(other[n], v, rtol=1e-2, atol=1e-4) for n, v in factors.items())


@pytest.mark.slow
def test_tensor_parallelism_is_refused_before_any_work(tmp_path: Path) -> None:
    """Of a model that transformers' own ``tp_plan`` has split over two processes."""
    tiny.llama().save_pretrained(tmp_path / "model")
    said = succeeded(
        launch(layer_scenarios.tensor_parallel, 2, tmp_path / "run", str(tmp_path / "model"))
    )
    assert all("split by tensor parallelism" in text for text in said)
    assert all("Load it without tp_plan" in text for text in said)


def test_one_split_weight_is_enough() -> None:
    """Plans need not begin with the first weight; before DTensors a plan left its mark on the module."""
    model = tiny.llama()
    assert unwrapped(model) is model
    model.lm_head._hf_tp_plan = "colwise"
    with pytest.raises(lorainit.errors.AdapterError, match="split by tensor parallelism"):
        unwrapped(model)
    del model.lm_head._hf_tp_plan
    model.lm_head.weight.device_mesh = "a mesh"
    with pytest.raises(lorainit.errors.AdapterError, match="split by tensor parallelism"):
        unwrapped(model)


def test_lengths_are_compared_on_some_alike(tmp_path: Path) -> None:
    """Processes with unequal shares take the same step, measured on all of their sequences."""
    results = succeeded(launch(layer_scenarios.compared_on_some, 2, tmp_path, True))
    (one, first), (other, second) = results
    assert one == other
    assert one["sequences"] == 24
    assert all(torch.equal(first[name], second[name]) for name in first)
    (whole, _), _ = succeeded(launch(layer_scenarios.compared_on_some, 2, tmp_path, False))
    assert one["base_loss"] == pytest.approx(whole["base_loss"], rel=1e-6)
    assert one["start_loss"] == pytest.approx(whole["start_loss"], rel=0.02)
    assert one["start_loss"] < one["base_loss"]
