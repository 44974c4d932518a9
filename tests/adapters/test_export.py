"""Export: plain LoRA at one rank and one scaling, cut where asked, written aside and renamed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import lorainit
from lorainit.adapters import export as exporting
from lorainit.errors import AdapterError, RankError
from lorainit.files import atomic
from lorainit.files.aside import Aside
from tests.adapters.tiny import METHODS, config, llama, logits, start, train

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def server_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a server that reads only r and lora_alpha adds to each layer."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    scaling = settings["lora_alpha"] / settings["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * tensors[key.replace("lora_A", "lora_B")]
        @ a
        for key, a in tensors.items()
        if "lora_A" in key
    }


def live_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_alpha": 7},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"gate_proj": 1}},
    ],
    ids=str,
)
def test_a_server_that_reads_r_and_alpha_alone_is_right(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    wrapped = train(start(llama(), METHODS[kind], config(**changes)))
    report = lorainit.export(wrapped, tmp_path / "out", max_rank=64)
    assert report.objections == ()
    factor = 2 if kind == "anchored" else 1
    ranks = [4, *changes.get("rank_pattern", {}).values()]
    assert report.rank == factor * max(ranks)
    expected = live_weights(wrapped)
    found = server_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(settings["lora_alpha"], int)
    assert settings["lora_alpha"] / settings["r"] == report.scaling
    shapes = {
        t.shape[0]
        for k, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_A" in k
    }
    assert shapes == {report.rank}


def test_a_plain_adapter_is_exported_bit_for_bit(tmp_path: Path) -> None:
    wrapped = train(start(llama(), METHODS["displaced"]))
    wrapped.save_pretrained(tmp_path / "saved")
    lorainit.export(wrapped, tmp_path / "out")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    out = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved.keys() == out.keys()
    assert all(torch.equal(saved[key], out[key]) for key in saved)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_cutting_is_the_best_approximation_and_its_error_is_reported(tmp_path: Path) -> None:
    wrapped = train(start(llama(), METHODS["anchored"]), steps=8, rate=0.5)
    live = live_weights(wrapped)
    for rank in (1, 4, 7):
        report = lorainit.export(wrapped, tmp_path / str(rank), rank=rank)
        assert report.rank == rank
        found = server_weights(tmp_path / str(rank))
        for name, weight in live.items():
            singular = torch.linalg.svdvals(weight.double())
            best = float(singular[rank:].norm() / singular.norm())
            error = float((found[name] - weight).norm() / weight.norm())
            assert report.errors[name] == pytest.approx(best, rel=1e-3, abs=1e-6)
            assert error == pytest.approx(best, rel=1e-3, abs=1e-5)
        assert report.largest_error == max(report.errors.values())
    whole = lorainit.export(wrapped, tmp_path / "whole", rank=8)
    assert whole.largest_error == 0
    padded = lorainit.export(wrapped, tmp_path / "padded", rank=12)
    assert padded.rank == 12
    exported = PeftModel.from_pretrained(llama(), tmp_path / "padded")
    torch.testing.assert_close(logits(exported), logits(wrapped), **CLOSE)
    with pytest.raises(RankError):
        lorainit.export(wrapped, tmp_path / "none", rank=0)


def test_an_untrained_anchored_adapter_is_exported_as_nothing(tmp_path: Path) -> None:
    report = lorainit.export(start(llama(), METHODS["anchored"]), tmp_path, rank=2)
    assert all(math.isfinite(error) for error in report.errors.values())
    exported = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(exported), logits(llama()), **CLOSE)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [2], "target_modules": ["q_proj"]}, "trainable_token_indices"),
    ],
)
def test_what_servers_refuse_is_said(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    wrapped = train(start(llama(), METHODS["anchored"], config(**changes)))
    report = lorainit.export(wrapped, tmp_path, rank=8)
    assert any(word in objection for objection in report.objections)
    exported = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(exported), logits(wrapped), **CLOSE)


def test_objections_to_folders_that_others_wrote(tmp_path: Path) -> None:
    wrapped = start(llama(), METHODS["anchored"], config(rank_pattern={"q_proj": 12}))
    wrapped.save_pretrained(tmp_path / "saved")
    said = " ".join(lorainit.serving_objections(tmp_path / "saved", max_rank=16))
    assert "rank_pattern" in said
    assert "rank 24 is above the limit of 16" in said
    assert lorainit.export(wrapped, tmp_path / "cut", rank=16, max_rank=16).objections == ()
    stock = peft.get_peft_model(llama(), config(init_lora_weights="pissa"))
    stock.save_pretrained(tmp_path / "pissa")
    assert any("pissa" in s for s in lorainit.serving_objections(tmp_path / "pissa"))


def test_stock_adapters_and_other_names_are_exported_too(tmp_path: Path) -> None:
    stock = peft.get_peft_model(
        llama(), config(rank_pattern={"q_proj": 2}, init_lora_weights=False), adapter_name="mine"
    )
    lorainit.export(stock, tmp_path, adapter_name="mine")
    exported = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(exported), logits(stock), **CLOSE)
    with pytest.raises(AdapterError, match="'mine'"):
        lorainit.export(stock, tmp_path)
    with pytest.raises(AdapterError, match="PeftModel"):
        lorainit.export(llama(), tmp_path)  # type: ignore[arg-type]


def test_an_older_export_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = train(start(llama(), METHODS["anchored"]))
    lorainit.export(wrapped, tmp_path / "out")
    older = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    train(wrapped)

    def full(tensors: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        lorainit.export(wrapped, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == older
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    lorainit.export(wrapped, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != older[
        "adapter_model.safetensors"
    ]


def test_an_older_side_file_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped = start(llama(), METHODS["anchored"])
    wrapped.save_pretrained(tmp_path)
    older = {p.name for p in tmp_path.iterdir()}
    before = (tmp_path / "lorainit.json").read_bytes()

    tried = []

    def full(self: Aside, target: Path) -> None:
        tried.append(target.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Aside, "put", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "report.html", "a page of text")
    with pytest.raises(OSError, match="No space left"):
        wrapped.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert "lorainit.json" in tried[-1]
    assert {p.name for p in tmp_path.iterdir()} == older
    assert (tmp_path / "lorainit.json").read_bytes() == before
    assert torch.equal(logits(lorainit.load_adapter(llama(), tmp_path)), logits(wrapped))


def test_an_export_is_trained_on_as_a_plain_adapter(tmp_path: Path) -> None:
    """Over a saved anchored folder too: the side file of that one goes."""
    wrapped = train(start(llama(), METHODS["anchored"]))
    wrapped.save_pretrained(tmp_path)
    lorainit.export(wrapped, tmp_path)
    assert not (tmp_path / "lorainit.json").exists()
    again = lorainit.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(wrapped), **CLOSE)
    assert again.get_nb_trainable_parameters()[0] == 2 * wrapped.get_nb_trainable_parameters()[0]
    assert type(LoraConfig.from_pretrained(tmp_path)) is LoraConfig
