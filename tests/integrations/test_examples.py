"""The examples as a user starts them, each where its tool is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fresh import run_program
from tests.life.words import tokenizer
from tests.statistics import models

ROOT = Path(__file__).parents[2]


def run(script: str, folder: Path, *extra: str) -> str:
    words = ["--model", str(folder / "model"), "--data", str(folder / "data")]
    words += ["--out", str(folder / "out"), "--rank", "2", "--steps", "3", *extra]
    return run_program(str(ROOT / "examples" / script), words, folder)


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "data").write_text("\n".join(json.dumps(row) for row in rows))


def language_model(folder: Path) -> None:
    words = tokenizer()
    words.save_pretrained(folder / "model")
    models.llama(vocab_size=len(words)).save_pretrained(folder / "model")


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


@pytest.mark.slow
@needs("trl")
@pytest.mark.parametrize("form", ["completion", "preferences"])
def test_start_trainer(form: str, tmp_path: Path) -> None:
    language_model(tmp_path)
    answers = ("completion",) if form == "completion" else ("chosen", "rejected")
    write(
        tmp_path,
        [
            {"prompt": f"w{i} w{i + 1}"} | {a: f" w{i + 2 + 3 * j}" for j, a in enumerate(answers)}
            for i in range(16)
        ],
    )
    assert "LoraDA: 14 layers started" in run("start_trainer.py", tmp_path, "--cpu")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@needs("lightning")
def test_lightning(tmp_path: Path) -> None:
    language_model(tmp_path)
    write(
        tmp_path,
        [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(16)],
    )
    assert "LoraDA: 14 layers started" in run("lightning_fit.py", tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@needs("sentence_transformers")
def test_sentence_transformers(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_special_tokens({"cls_token": "<u>", "sep_token": "<eos>"})
    words.save_pretrained(tmp_path / "model")
    models.bert(
        head="MaskedLM",
    ).bert.save_pretrained(tmp_path / "model")
    write(
        tmp_path,
        [{"anchor": f"w{i} w{i + 1} w2", "positive": f"w{i} w3"} for i in range(16)],
    )
    assert "LoraDA: 12 layers started" in run("sentence_transformers_fit.py", tmp_path, "--cpu")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@needs("diffusers")
def test_diffusers(tmp_path: Path) -> None:
    from tests.integrations.test_diffusers import noise, unet

    unet().save_pretrained(tmp_path / "model")
    batches = [
        {"latents": noise(4, 4, 8, 8, seed=i), "text": noise(4, 5, 16, seed=50 + i)}
        for i in range(4)
    ]
    torch.save(batches, tmp_path / "data")
    assert "LoraDA: 32 layers started" in run("diffusers_unet.py", tmp_path)
    assert list((tmp_path / "out").glob("*.safetensors"))
