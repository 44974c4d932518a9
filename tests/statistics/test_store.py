"""The statistics file: what goes in comes out, bit for bit, sharing and all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lorainit
from lorainit.errors import StatisticsFileError
from lorainit.statistics import Statistics
from lorainit.statistics.store import layer_table, packed_symmetric, sharded_files
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


# --- shards, triangles, older files -------------------------------------------------------------


def test_a_large_one_is_written_as_shards(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    limit = statistics.nbytes // 5
    statistics.save(path, max_shard_size=limit)
    shards = sorted(tmp_path.glob("s-*.safetensors"))
    assert not path.exists()
    assert len(shards) >= 3
    assert all(shard.stat().st_size <= limit + 10_000 for shard in shards)
    index = json.loads((tmp_path / "s.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    for key, name in index["weight_map"].items():
        with safe_open(tmp_path / name, framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118
    for name in ("s.safetensors", "s.safetensors.index.json"):
        loaded = lorainit.Statistics.load(tmp_path / name)
        assert_equal(loaded, statistics)
        assert shared_groups(loaded) == shared_groups(statistics)
        assert loaded.metadata == statistics.metadata
        assert list(loaded.fingerprints) == list(statistics.fingerprints)


def test_a_save_leaves_nothing_of_the_one_before(
    statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    small = collect(models.llama(), batches(sequences(2), 2), needs={"gradient"})
    other = tmp_path / "s-of-somebody.txt"
    other.write_text("not ours")
    for size in ("4GiB", statistics.nbytes // 3, statistics.nbytes // 5, "4GiB"):
        small.save(path)
        statistics.save(path, max_shard_size=size)
        assert_equal(lorainit.Statistics.load(path), statistics)
        names = {p.name for p in tmp_path.iterdir()} - {other.name}
        if path.exists():
            assert names == {path.name}
        else:
            index = json.loads((tmp_path / "s.safetensors.index.json").read_text())
            assert names == {"s.safetensors.index.json", *index["weight_map"].values()}
    assert other.exists()


@pytest.mark.parametrize("size", ["4GiB", 20_000])
def test_a_failure_leaves_what_was_there(
    statistics: lorainit.Statistics, tmp_path: Path, monkeypatch, size: int | str
) -> None:
    path = tmp_path / "s.safetensors"
    statistics.save(path, max_shard_size=size)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    original, calls = sharded_files._write_tensor, []

    def failing(*arguments) -> None:
        calls.append(1)
        if len(calls) > 9:
            raise OSError("no space left")
        original(*arguments)

    monkeypatch.setattr(sharded_files, "_write_tensor", failing)
    with pytest.raises(OSError, match="What was there before is still there"):
        statistics.save(path, max_shard_size=size)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_symmetric_matrices_are_stored_as_one_triangle(
    statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, layer in statistics.items():
        width = layer.output_second_moment_sum.shape[0]
        triangle = stored[f"layer/{name}/output_second_moment_sum"]
        assert triangle.shape == (width * (width + 1) // 2,)
        rows, columns = torch.triu_indices(width, width)
        assert torch.equal(triangle, layer.output_second_moment_sum[rows, columns])


def test_a_matrix_that_is_not_symmetric_is_stored_whole(tmp_path: Path) -> None:
    """Rounding may leave its halves apart; more than that is refused."""
    matrix = 10 * torch.eye(3)
    matrix[0, 1], matrix[1, 0] = 0.01, 0.02
    layer = LayerStatistics.from_means(input_second_moment=matrix)
    lorainit.Statistics({"a": layer}).save(tmp_path / "s.safetensors")
    loaded = lorainit.Statistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded["a"].input_second_moment_sum, matrix)


@pytest.mark.parametrize("width", [1, 2, 511, 512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_triangle_is_its_matrix(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(7, width, dtype=dtype)
    matrix = packed_symmetric.mirror(rows.mT @ rows)
    assert packed_symmetric.is_symmetric(matrix)
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(packed_symmetric.unpack(packed_symmetric.pack(matrix), width), matrix)
    if width > 1:
        matrix[width - 1, 0] += 1
        assert not packed_symmetric.is_symmetric(matrix)
    with pytest.raises(ValueError, match="numbers"):
        packed_symmetric.unpack(torch.zeros(width), width + 1)


def test_a_file_of_the_first_version_still_loads(
    statistics: lorainit.Statistics, tmp_path: Path
) -> None:
    tensors, places = statistics._unique_tensors()
    header = {
        "format": "lorainit-statistics",
        "version": "1",
        "lorainit": "0.1.0",
        "layers": json.dumps(
            {n: layer_table.layer_record(statistics[n], places[n]) for n in places}
        ),
        "metadata": json.dumps(statistics.metadata),
    }
    prints = {f"fingerprint/{n}": t for n, t in statistics.fingerprints.items()}
    save_file(
        {k: t.contiguous() for k, t in (tensors | prints).items()},
        tmp_path / "s.safetensors",
        header,
    )
    loaded = lorainit.Statistics.load(tmp_path / "s.safetensors")
    assert_equal(loaded, statistics)


def test_damaged_shards_are_errors(statistics: lorainit.Statistics, tmp_path: Path) -> None:
    path, index = tmp_path / "s.safetensors", tmp_path / "s.safetensors.index.json"
    statistics.save(path, max_shard_size=statistics.nbytes // 4)
    table = json.loads(index.read_text())
    for damage, said in (
        ({"weight_map": {k: f"../{n}" for k, n in table["weight_map"].items()}}, "other folders"),
        ({"weight_map": 3}, "damaged"),
        ({"metadata": {}}, "not one of lorainit"),
        ({"metadata": {**table["metadata"], "triangles": '{"a": -1}'}}, "damaged"),
        (
            {"metadata": {**table["metadata"], "triangles": json.dumps({first_key(table): 7})}},
            "damaged",
        ),
    ):
        index.write_text(json.dumps(table | damage))
        with pytest.raises(StatisticsFileError, match=said):
            lorainit.Statistics.load(path)
    index.write_text("{")
    with pytest.raises(StatisticsFileError, match="damaged"):
        lorainit.Statistics.load(path)
    index.write_text(json.dumps(table))
    missing = next(iter(table["weight_map"].values()))
    (tmp_path / missing).unlink()
    with pytest.raises(StatisticsFileError, match=rf"{missing}.*is missing"):
        lorainit.Statistics.load(path)


def first_key(table: dict) -> str:
    return next(k for k in table["weight_map"] if k.endswith("output_second_moment_sum"))


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (0, "abcd"),
        # The last one comes back to be solved, so the one before it goes, too.
        (1, "ab"),
        (400, "ab"),
        (401, "a"),
        (10**9, ""),
    ],
)
def test_what_comes_back_is_not_free(
    wanted: int, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of 400 bytes, the last of 1,600."""
    layers = {name: LayerStatistics(gradient_sum=torch.zeros(10, 10)) for name in "abc"}
    layers["d"] = LayerStatistics(gradient_sum=torch.zeros(20, 20))
    found = Statistics(layers, {})
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    found.relieve(torch.device("cpu"), wanted)
    assert [n for n in "abcd" if found[n].gradient_sum is layers[n].gradient_sum] == list(left)


def test_relieving_a_device_mixes_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that are gone, others may have the address: here a copy stands for another device's."""
    statistics = collect(models.llama(), batches(sequences(), 3))
    before = {
        (name, field): tensor.clone()
        for name, layer in statistics.items()
        for field in layer.TENSORS
        if (tensor := getattr(layer, field)) is not None
    }
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    statistics.relieve(torch.device("cpu"), 10**9)
    for (name, field), tensor in before.items():
        assert torch.equal(getattr(statistics[name], field), tensor), (name, field)
    q, k = (statistics[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert q.input_second_moment_sum is k.input_second_moment_sum
