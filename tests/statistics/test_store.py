"""The statistics file: what goes in comes out, bit for bit, sharing and all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lorainit
from lorainit.types import STATISTICS, LayerStatistics
from tests.statistics import models
from tests.statistics.models import all_linear, batches, sequences
from tests.statistics.test_against_autograd import collect
from tests.statistics.test_invariance import shared_groups

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def statistics(request: pytest.FixtureRequest) -> lorainit.Statistics:
    return collect(models.llama(request.param), batches(sequences(), 3))


def assert_equal(found: lorainit.Statistics, expected: lorainit.Statistics) -> None:
    assert list(found) == list(expected)
    for name, layer in expected.items():
        for field in LayerStatistics.TENSORS:
            a, b = getattr(found[name], field), getattr(layer, field)
            if b is None:
                assert a is None
            else:
                assert a.dtype == b.dtype
                assert torch.equal(a, b)
        for field in (*LayerStatistics.COUNTS, "loss_reduction", "population"):
            assert getattr(found[name], field) == getattr(layer, field)


def test_round_trip(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    path = tmp_path / "made" / "here" / "statistics.safetensors"
    statistics.save(path)
    loaded = lorainit.Statistics.load(path)
    assert_equal(loaded, statistics)
    assert shared_groups(loaded) == shared_groups(statistics)
    assert max(map(len, shared_groups(loaded))) == 3
    assert loaded.metadata == statistics.metadata
    assert {"needs", "token_mask", "loss_reduction", "sequences"} <= set(loaded.metadata)
    assert list(loaded.fingerprints) == list(statistics.fingerprints) == list(statistics)
    for name, fingerprint in statistics.fingerprints.items():
        assert torch.equal(loaded.fingerprints[name], fingerprint)
    assert os.listdir(path.parent) == [path.name]


def test_what_is_shared_is_stored_once(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.endswith("input_second_moment_sum")]  # noqa: SIM118
    assert len(keys) == len(shared_groups(statistics)) < len(statistics)


def test_factors_from_a_file_are_those_from_the_data(tmp_path: Path) -> None:
    rows = batches(sequences(), 3)
    direct = lorainit.get_peft_model(
        models.llama(), all_linear(), method=lorainit.LoraDA(), data=rows, progress=False
    )
    found = collect(models.llama(), rows, needs=STATISTICS)
    found.save(tmp_path / "s.safetensors")
    loaded = lorainit.Statistics.load(tmp_path / "s.safetensors")
    stored = lorainit.get_peft_model(
        models.llama(), all_linear(), method=lorainit.LoraDA(), statistics=loaded, progress=False
    )
    expected = dict(direct.named_parameters())
    for name, parameter in stored.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-7)


def test_saving_over_a_file_replaces_it(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    collect(models.llama(), batches(sequences(2), 2), needs={"gradient"}).save(path)
    statistics.save(path)
    assert_equal(lorainit.Statistics.load(path), statistics)


def test_the_same_data_give_the_same_statistics() -> None:
    first, second = (collect(models.llama(), batches(sequences(), 3)) for _ in range(2))
    assert_equal(first, second)


def test_moving_keeps_sharing_and_does_not_touch_the_original(
    statistics: lorainit.Statistics,
) -> None:
    moved = statistics.to(dtype=torch.float64)
    assert shared_groups(moved) == shared_groups(statistics)
    assert moved[NAME].gradient.dtype == torch.float64
    assert moved.metadata == statistics.metadata
    torch.testing.assert_close(
        moved[NAME].gradient, statistics[NAME].gradient.double(), rtol=1e-6, atol=1e-12
    )


def test_an_unknown_layer_is_named(statistics: lorainit.Statistics) -> None:
    with pytest.raises(KeyError, match=r"no statistics for layer 'nowhere'.*14 layers"):
        statistics["nowhere"]


def test_repr_says_what_it_is(statistics: lorainit.Statistics) -> None:
    assert "14 layers" in repr(statistics)
