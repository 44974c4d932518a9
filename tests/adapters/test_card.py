"""The card beside a started adapter: what it says, and whose it stays."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

import lorainit
from lorainit.adapters.card import is_edited
from tests.adapters import tiny


def started(method: object, **options: object) -> PeftModel:
    data = [tiny.batch()] if method.needs else None
    config = tiny.config(task_type="CAUSAL_LM", base_model_name_or_path="owner/base")
    model = lorainit.get_peft_model(
        tiny.llama(), config, method=method, data=data, progress=False, **options
    )
    model.peft_config["default"].base_model_name_or_path = "owner/base"
    return model


def saved(model: PeftModel, folder: Path) -> ModelCard:
    lorainit.save_adapter(model, folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_was_started_and_how_it_is_loaded(tmp_path: Path) -> None:
    model = started(lorainit.LoraDA(gamma=7.0), suggest_rate=True)
    card = saved(model, tmp_path / "a")
    measured = model.peft_config["default"].origin.measured
    for words in (
        "`owner/base`", "LoraDA", "gamma=7.0", "**Rank:** 4;",
        f"learning rate:** {measured['learning_rate']:.2g}", f"- lorainit {lorainit.__version__}",
    ):  # fmt: skip
        assert words in card.text, words
    assert "Resized" not in card.text
    matched = started(lorainit.LoraDA(gamma=7.0), learning_rate=measured["learning_rate"] / 5)
    text = saved(matched, tmp_path / "c").text
    assert "**Resized for its learning rate:** factors times 0.177; `lora_alpha` was 8" in text
    assert "`lora_alpha=256`" in text
    assert f"learning rate:** {measured['learning_rate'] / 5:.2g}" in text
    targets = model.peft_config["default"].target_modules
    assert targets
    ends = {name.rpartition(".")[2] for name in targets}
    assert len(ends) < len(targets)
    assert all(f"`{name}`" in card.text for name in ends)
    assert f": {len(targets)} layers" in card.text
    assert "frozen start" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    ast.parse(code)
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in code
    # What hubs read is PEFT's own.
    model.save_pretrained(tmp_path / "b")
    theirs = ModelCard.load(tmp_path / "b" / "README.md")
    assert theirs.data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "peft"
    assert "More Information Needed" in theirs.text
    assert "More Information Needed" not in card.text


def test_the_card_says_how_many_sequences_the_statistics_rest_on(tmp_path: Path) -> None:
    batch = tiny.batch(rows=12)
    card = saved(tiny.start(tiny.llama(), lorainit.EVA(), data=[batch]), tmp_path / "eva")
    assert "- **Statistics:** of 12 sequences\n" in card.text
    # A fifth of them measures the length.
    card = saved(tiny.start(tiny.llama(), lorainit.Natural(), data=[batch]), tmp_path / "natural")
    assert "- **Statistics:** of 10 sequences, beside 2 that were held back" in card.text
    assert "on 2 sequences" in card.text
    statistics = lorainit.collect_statistics(
        tiny.llama(),
        tiny.config(),
        data=[tiny.batch(rows=7)],
        needs=lorainit.EVA().needs,
        progress=False,
    )
    card = saved(
        tiny.start(tiny.llama(), lorainit.EVA(), statistics=statistics), tmp_path / "given"
    )
    assert "- **Statistics:** of 7 sequences\n" in card.text
    assert "**Statistics" not in saved(started(lorainit.PiSSA()), tmp_path / "none").text


def test_an_anchored_start_is_said(tmp_path: Path) -> None:
    card = saved(started(lorainit.PiSSA()), tmp_path / "a")
    assert "**Rank:** 8, the second half of which is the frozen start" in card.text
    assert "freezes the start again" in card.text


def test_an_unedited_card_follows_the_adapter(tmp_path: Path) -> None:
    """This package's own, and PEFT's; and the metadata that a user has added stay."""
    model = started(lorainit.PiSSA())
    model.save_pretrained(tmp_path / "a")
    assert "with PiSSA" in saved(model, tmp_path / "a").text
    file = tmp_path / "a" / "README.md"
    file.write_text(file.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1))
    # PEFT's save adds its own version to any card.
    model.save_pretrained(tmp_path / "a")
    again = saved(started(lorainit.MiLoRA()), tmp_path / "a")
    assert "with MiLoRA" in again.text
    assert "with PiSSA" not in again.text
    assert again.data.license == "mit"


@pytest.mark.parametrize("whose", ["peft", "ours", "a text of their own"])
def test_an_edited_card_stays(whose: str, tmp_path: Path) -> None:
    model, file = started(lorainit.PiSSA()), tmp_path / "README.md"
    if whose == "ours":
        saved(model, tmp_path)
    elif whose == "peft":
        model.save_pretrained(tmp_path)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    assert not is_edited(ModelCard(text).text) or not text
    edited = f"{text}\nTrained on my recipes.\n"
    file.write_text(edited)
    kept = saved(started(lorainit.MiLoRA()), tmp_path).text
    assert "Trained on my recipes." in kept
    assert "with MiLoRA" not in kept
    assert ("with PiSSA" in kept) == (whose == "ours")


def test_an_adapter_that_was_not_started_here_keeps_pefts_card(tmp_path: Path) -> None:
    plain = get_peft_model(tiny.llama(), tiny.config())
    assert "More Information Needed" in saved(plain, tmp_path).text
