"""A damaged adapter is one error, and the base is as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorainit
from lorainit.errors import LorainitError
from tests.adapters import tiny
from tests.faults.states import differences, state_of

WEIGHTS, CONFIG, SIDE = "adapter_model.safetensors", "adapter_config.json", "lorainit.json"


def tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        table = load_file(folder / WEIGHTS)
        change(table)
        save_file(table, folder / WEIGHTS)
        # Which names the weights that it belongs to, and would be the first to differ.
        (folder / SIDE).unlink()

    return damage


def other_weights(folder: Path) -> None:
    table = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in table.items()}, folder / WEIGHTS)


def table(file: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return damage


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def remove(table: dict[str, Tensor]) -> None:
    del table[first(table)]


def poison(table: dict[str, Tensor]) -> None:
    table[first(table)][0, 0] = float("nan")


def other_rank(folder: Path) -> None:
    for file in (CONFIG, SIDE):
        table(file, r=16)(folder)


def first(table: dict[str, Tensor]) -> str:
    return min(table)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (cut, "cannot be read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no adapter_model"),
    "pickled": (pickled, "are pickled"),
    "no config": (lambda f: (f / CONFIG).unlink(), "holds no adapter_config.json"),
    "config no table": (text(CONFIG, "[]"), "is damaged"),
    "config cut off": (text(CONFIG, '{"r": 4'), "is damaged"),
    "config too deep": (text(CONFIG, "[" * 100000), "is damaged"),
    "rank zero": (table(CONFIG, r=0), "r must be a whole number"),
    "rank as text": (table(CONFIG, r="4"), "r must be a whole number"),
    "alpha nan": (table(CONFIG, lora_alpha=float("nan")), "lora_alpha must be a finite number"),
    "broken pattern": (table(CONFIG, target_modules="("), "is no regular expression"),
    "other targets": (table(CONFIG, target_modules=["nowhere"]), "does not fit this model"),
    "other rank": (other_rank, "does not fit"),
    "tensor missing": (tensors(remove), "tensors are missing"),
    "tensor renamed": (tensors(lambda t: t.update(x=t.pop(first(t)))), "tensors are missing"),
    "not finite": (tensors(poison), "are not finite"),
    "other shape": (tensors(lambda t: t.update({first(t): torch.ones(3, 5)})), "does not fit"),
    "other weights": (other_weights, "was written with other weights"),
    "side file of texts": (table(SIDE, anchored="false"), "is damaged"),
    "side file too deep": (text(SIDE, "[" * 100000), "is damaged"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    wrapped = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    tiny.train(wrapped)
    lorainit.save_adapter(wrapped, folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: object, **named: object) -> None:
        raise AssertionError(f"a hub was asked: {arguments} {named}")

    monkeypatch.setattr("peft.utils.save_and_load.hf_hub_download", asked)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", asked)
    monkeypatch.setattr("peft.config.hf_hub_download", asked)


@pytest.mark.parametrize("where", ["base", "beside another"])
@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_it_is_one_error_and_the_base_is_as_it_was(
    damage: str,
    where: str,
    saved: Path,
    no_hub: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, said = DAMAGES[damage]
    shutil.copytree(saved, tmp_path / "a")
    change(tmp_path / "a")
    model = tiny.llama()
    if where != "base":
        model = lorainit.load_adapter(model, saved)
    before = state_of(model)
    # A relative name looks like one of a hub.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorainitError, match=said) as caught:
        lorainit.load_adapter(model, "a", adapter_name="default" if where == "base" else "other")
    assert "\n" not in str(caught.value)
    assert not differences(before, state_of(model))


def test_an_adapter_of_another_base(saved: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    before = state_of(model)
    with pytest.raises(LorainitError, match="does not fit this model"):
        lorainit.load_adapter(model, saved)
    assert not differences(before, state_of(model))


def test_a_folder_that_is_not_damaged_loads(saved: Path, no_hub: None) -> None:
    """The negative control, and that a change would be seen."""
    model = tiny.llama()
    before = state_of(model)
    wrapped = lorainit.load_adapter(model, saved)
    assert differences(before, state_of(model))
    stock = lorainit.load_adapter(tiny.llama(), saved, anchored=False)
    torch.testing.assert_close(tiny.logits(wrapped), tiny.logits(stock))


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_a_damaged_adapter_whose_loading_moves_the_base_leaves_it(
    init: str, tmp_path: Path
) -> None:
    """PEFT takes such starts out of the base weights; a whole one, the control, does move them."""
    saved = get_peft_model(tiny.llama(), tiny.config(init_lora_weights=init))
    saved.save_pretrained(tmp_path)
    base = tiny.llama()
    lorainit.load_adapter(base, tmp_path)
    moved = differences(tiny.base_weights(tiny.llama()), tiny.base_weights(base))
    assert moved
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    base = tiny.llama()
    before = state_of(base)
    with pytest.raises(lorainit.errors.AdapterError, match="tensors are missing"):
        lorainit.load_adapter(base, tmp_path)
    assert not differences(before, state_of(base))


def test_a_configuration_that_needs_another_package_is_one_error(tmp_path: Path) -> None:
    lorainit.save_adapter(tiny.start(tiny.llama(), lorainit.PiSSA()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"megatron_config": {"a": 1}}))
    with pytest.raises(
        lorainit.errors.AdapterError, match="does not fit this model, or is damaged"
    ):
        lorainit.load_adapter(tiny.llama(), tmp_path)
