"""The examples as a user starts them, on a tiny model and two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.life.sft import tokenizer
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


def run(folder: Path, launcher: list[str], script: str, *extra: str) -> str:
    command = [sys.executable, "-m", *launcher, str(ROOT / "examples" / script)]
    command += ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl")]
    command += ["--out", str(folder / "adapter"), "--rank", "2", "--steps", "3", *extra]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=400, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base(ids).logits.detach().clone()
    after = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_fully_shard(folder: Path) -> None:
    out = run(folder, ["torch.distributed.run", "--nproc_per_node=2"], "fully_shard.py")
    assert out.count("loss") == 3
    check_adapter(folder)


@pytest.mark.slow
def test_sft(folder: Path) -> None:
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    run(folder, launcher, "sft.py", "--cpu")
    check_adapter(folder)
