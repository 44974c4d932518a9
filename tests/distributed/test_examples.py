"""The examples as a user starts them, on a tiny model and two processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fresh import run_program
from tests.life.words import tokenizer
from tests.statistics import models

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = tokenizer()
    words.save_pretrained(tmp_path / "model")
    model = models.llama(vocab_size=len(words))
    model.save_pretrained(tmp_path / "model")
    lines = [
        {"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"}
        for i in range(16)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "train.jsonl").write_text(text)
    return tmp_path


def run(folder: Path, program: list[str], *extra: str, processes: int = 1) -> str:
    """In processes that are forked; those that a launcher starts are new interpreters."""
    words = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    words += ["--out", str(folder / "adapter"), "--rank", "2", "--steps", "3", *extra]
    return run_program(program[0], [*program[1:], *words], folder, processes)


def check_adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits.detach().clone()
    after = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_fully_shard(folder: Path) -> None:
    script = str(ROOT / "examples" / "fully_shard.py")
    out = run(folder, [script], processes=2)
    assert out.count("loss") == 3
    check_adapter(folder)


LOSS = re.compile(r"'loss': '?([0-9.]+)")


@pytest.mark.slow
def test_sft(folder: Path) -> None:
    """DDP, and FSDP2 by the configuration beside the example: one training."""
    script = str(ROOT / "examples" / "sft.py")
    out = run(folder, [script], "--cpu", processes=2)
    check_adapter(folder)
    expected = load_file(folder / "adapter" / "adapter_model.safetensors")
    losses = [float(text) for text in LOSS.findall(out)]
    assert len(losses) == 3
    assert out.count("LoraDA: 14 layers started") == 2
    launcher = ["accelerate.commands.launch", "--mixed_precision=no", "--main_process_port=0"]
    launcher += [f"--config_file={ROOT / 'examples' / 'fsdp2.yaml'}"]
    shim = str(ROOT / "tests" / "distributed" / "sharded_on_cpu.py")
    out = run(folder, [*launcher, shim, script], "--cpu")
    assert "sharded parameters: 0" not in out
    assert out.count("sharded parameters: ") == 2
    check_adapter(folder)
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        # One start; then Adam takes steps of full length also where a gradient is mere rounding.
        assert found[key].shape == value.shape
        assert (found[key] - value).abs().max() <= 2 * 3 * 1e-4, key
    assert [float(text) for text in LOSS.findall(out)] == pytest.approx(losses, rel=1e-3)
