"""A base checkpoint that is not whole is one line, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, BertModel

from lorainit.cli import main
from lorainit.errors import DataError
from lorainit.models.pretrained import load_whole
from tests.adapters import tiny

LAYER = "model.layers.0.mlp.up_proj.weight"


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[LAYER]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop(LAYER)


def in_addition(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors[LAYER].clone()


def of_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER] = tensors[LAYER][:3].clone()


def without_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def of_another_task(tensors: dict[str, Tensor]) -> None:
    tensors["score.weight"] = torch.ones(2, 3)


def altered(place: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(place / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start(model: Path, output: Path, *more: str) -> int:
    words = ["init", "--model", model, "--method", "pissa", "--rank", "2", "--quiet"]
    return main([*map(str, words), "--output", str(output), *more])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorainit: error: ")
    return line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, f"lacks the weight '{LAYER}'"),
        (renamed, f"lacks the weight '{LAYER}'"),
        (in_addition, "no layer of the model takes, 'model.layers.2.mlp.up_proj.weight'"),
        (of_another_shape, f"of the weight '{LAYER}': it is not whole"),
        (without_head, "lacks the weight 'lm_head.weight'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], None],
    said: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = altered(place, tmp_path / "m", change)
    assert start(model, tmp_path / "a") == 1
    assert said in one_line(capsys)
    assert not (tmp_path / "a").exists()


def test_a_head_that_is_not_used_does_no_harm(place: Path, tmp_path: Path) -> None:
    """The negative control: the same folder, rewritten, and with the head of another task, serves."""
    assert start(altered(place, tmp_path / "m", of_another_task), tmp_path / "a") == 0
    assert (tmp_path / "a" / "adapter_config.json").is_file()


class Opened:
    """Unpickled, it writes a file: what a stranger's pickle may do."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_pickled_weights_are_not_opened(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m"
    shutil.copytree(place / "model", model)
    (model / "model.safetensors").unlink()
    torch.save(Opened(str(tmp_path / "ran")), model / "pytorch_model.bin")
    assert start(model, tmp_path / "a") == 1
    said = one_line(capsys)
    assert "pickled (pytorch_model.bin)" in said
    assert "use_safetensors=False" in said
    assert not (tmp_path / "ran").exists()
    (model / "pytorch_model.bin").unlink()
    assert start(model, tmp_path / "a") == 1
    assert "holds no weights" in one_line(capsys)


def with_code(place: Path, folder: Path) -> Path:
    """A model whose classes stand in its folder."""
    shutil.copytree(place / "model", folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["architectures"] = ["OwnModel"]
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_the_model_runs_when_it_is_trusted_and_is_never_asked_about(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))

    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    model = with_code(place, tmp_path / "m")
    assert start(model, tmp_path / "a") == 1
    assert "give --trust-remote-code" in one_line(capsys)
    assert not (tmp_path / "c").exists()
    assert start(model, tmp_path / "a", "--dry-run") == 1
    assert "give --trust-remote-code" in one_line(capsys)
    assert start(model, tmp_path / "a", "--trust-remote-code") == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()


def test_a_new_head_is_allowed_by_name_alone(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, intermediate_size=24, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"lacks the weight 'classifier\.bias' \(2 such\)"):
        load_whole(BertForSequenceClassification, str(tmp_path))
    load_whole(BertForSequenceClassification, str(tmp_path), new_head=("classifier.",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**300}, "asks for 10000000000000000000 layers"),
        ({"vocab_size": 10**300}, "cannot be built from its config.json"),
        ({"rope_theta": "odd"}, "cannot be built from its config.json"),
    ],
    ids=["layers", "vocabulary", "text"],
)
def test_a_config_that_makes_no_model_is_one_line(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    tiny.llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    table = json.loads(file.read_text())
    if "rope_theta" in change:
        change = {"rope_parameters": table.get("rope_parameters", {}) | change}
    file.write_text(json.dumps(table | change))
    with pytest.raises(DataError, match=said):
        load_whole(AutoModelForCausalLM, str(tmp_path))
