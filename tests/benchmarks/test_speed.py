"""The speed benchmark's line on a tiny model: cases, resuming, failures, tables."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks.common import json_lines
from benchmarks.common.decoder import PROJECTIONS, SHAPES, batches_of, build
from benchmarks.speed import figure
from benchmarks.speed import measure as speed
from benchmarks.speed import tables as table
from benchmarks.speed.plans import big_plan, processor_plan, tiny_plan
from benchmarks.speed.quantized_starts import predicted

CPU = torch.device("cpu")
WANTED = (
    *("floor", "LoRA-DA", "full Sy", "LoRA-DA within 24 GiB", "PEFT LoRA-GA", "ranks"),
    *("floor, 4 blocks", "LoRA-DA within a budget, 4 blocks"),
)


def cases(*names: str):
    return [case for case in tiny_plan() if case.name in names]


def test_plans_name_each_case_once_and_the_tiny_one_has_all_of_the_large_one() -> None:
    for plan in (big_plan(), processor_plan(), tiny_plan()):
        names = [case.name for case in plan]
        assert len(set(names)) == len(names)
        assert all(case.kind in speed.KINDS for case in plan)
    assert {c.kind for c in tiny_plan()} == {c.kind for c in big_plan()}


def test_measured_once_and_shown(tmp_path) -> None:
    out = tmp_path / "speed.jsonl"
    records = speed.measure(cases(*WANTED), CPU, out, 1e6)
    assert not [r for r in records if "error" in r]
    assert {r["name"] for r in json_lines.read(out)} == {"provenance", *WANTED}
    start = table.by_name(records)["LoRA-DA"]
    spent = start["seconds"]
    assert (
        sum(spent[part] for part in ("plan", "pass", "finish", "solve", "install")) < spent["total"]
    )
    assert start["passes"] == 1
    assert start["statistics_gib"] > 0
    text = table.tables(records)
    assert "| LoRA-DA |" in text
    ((blocks, *_),) = table.longer(table.by_name(records))
    assert blocks == 2  # of the tiny shape
    assert table.ratio(table.by_name(records), "LoRA-DA") == pytest.approx(
        table.pass_seconds(start) / table.by_name(records)["floor"]["seconds"]["floor"]
    )
    again = speed.measure(cases(*WANTED), CPU, out, 1e6)
    assert [r["name"] for r in again].count("LoRA-DA") == 1  # not measured again
    pytest.importorskip("matplotlib")
    figure.picture(records, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_case_that_fails_says_so_and_the_next_begins(tmp_path, monkeypatch) -> None:
    out = tmp_path / "speed.jsonl"

    def broken(*_) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setitem(speed.KINDS, "start", broken)
    records = speed.measure(cases("LoRA-DA", "floor"), CPU, out, 1e6)
    failed = [r for r in records if "error" in r]
    assert [r["name"] for r in failed] == ["LoRA-DA"]
    assert "no luck" in failed[0]["error"]
    assert "no luck" in table.tables(records)
    monkeypatch.undo()
    tried = [r for r in speed.measure(cases("LoRA-DA"), CPU, out, 1e6) if r["name"] == "LoRA-DA"]
    assert ["error" in r for r in tried] == [True, False]
    json.dumps(records)


def test_a_shape_in_four_bits_is_made_of_packed_layers() -> None:
    """Of the random weights that it was made from, to what four bits keep; nothing is left on meta."""
    kind = pytest.importorskip("hqq.core.quantize").HQQLinear
    model = build(SHAPES["tiny, 4 bits"], CPU)
    packed = [m for n, m in model.named_modules() if n.rpartition(".")[2] in PROJECTIONS]
    assert len(packed) == 2 * len(PROJECTIONS)
    assert all(isinstance(layer, kind) for layer in packed)
    for layer in packed:
        assert 0.018 < float(layer.dequantize().std()) < 0.022
        # Two numbers of four bits a byte.
        assert 2 * layer.W_q.numel() == layer.dequantize().numel()
    assert not any(parameter.is_meta for parameter in model.parameters())
    batch = batches_of(cases("LoRA-DA")[0])[0]
    assert bool(model(**batch).loss.isfinite())


def test_starts_of_a_base_in_four_bits_read_its_reference_from_disk(tmp_path) -> None:
    pytest.importorskip("hqq.core.quantize")
    names = ("QERA, 7B in 4 bits", "Auto, giving back, 7B in 4 bits")
    records = speed.measure(cases(*names), CPU, tmp_path / "speed.jsonl", 1e6)
    assert not [r for r in records if "error" in r]
    known = table.by_name(records)
    for name in names:
        record = known[name]
        assert 0 < record["seconds"]["read"] < record["seconds"]["total"]
        assert record["plan"][0].startswith("reference weights of 14 layers")
    assert [known[name]["passes"] for name in names] == [1, 1]


def test_labels_are_what_the_model_finds_likeliest() -> None:
    """Its loss of them is the least that labels can have; of labels one place off it is not."""
    case = cases("LoRA-DA")[0]
    model, batches = build(SHAPES["tiny"], CPU), batches_of(case)
    with torch.no_grad():
        for batch, plain in zip(predicted(model, batches, CPU), batches, strict=True):
            logits = model(input_ids=plain["input_ids"]).logits[:, :-1]
            least = -logits.log_softmax(-1).amax(-1).mean()
            torch.testing.assert_close(model(**batch).loss, least)
            shifted = {**batch, "labels": batch["labels"].roll(1, -1)}
            assert model(**shifted).loss > least + 1e-3
            assert torch.equal(batch["input_ids"], plain["input_ids"])
