"""axolotl by its own command line, on a processor: the start, training, a run that resumes, stock PEFT.

Run where axolotl is installed, in an environment of its own: it pins versions other than the suite's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.life.words import tokenizer
from tests.statistics import models

pytest.importorskip("axolotl")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("axolotl")
    words = tokenizer()
    words.save_pretrained(place / "model")
    models.llama(vocab_size=len(words)).save_pretrained(place / "model")
    rows = [
        {"instruction": f"w{i} w{i + 1}", "input": "", "output": f"w{i + 2}"} for i in range(24)
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def trained(folder: Path, name: str, method: str, **changes: Any) -> list[float]:
    """The losses of four steps."""
    settings: dict[str, Any] = {
        "base_model": str(folder / "model"),
        "datasets": [
            {"path": str(folder / "train.jsonl"), "ds_type": "json", "type": "alpaca"},
        ],
        "dataset_prepared_path": str(folder / f"prepared-{name}"),
        "output_dir": str(folder / name),
        "sequence_len": 256,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        # Of these the first is written for CUDA alone.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": True,
        "lora_o_kernel": True,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-2,
        "bf16": False,
        "tf32": False,
        "logging_steps": 1,
        "save_steps": 2,
        "seed": 3,
        "plugins": ["lorainit.integrations.axolotl.LorainitPlugin"],
        "lorainit": {"method": method, "max_sequences": 16},
    } | changes
    path = folder / f"{name}.yml"
    path.write_text(yaml.safe_dump(settings))
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(path)],
        env=os.environ | own | {"AXOLOTL_DO_NOT_TRACK": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "14 layers started" in done.stdout + done.stderr
    state = json.loads((folder / name / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("method", ["lora-da", "filet"])
def test_training_by_the_plugin(method: str, folder: Path) -> None:
    """With kernels that read weights directly, and without; from the start, and from half-way."""
    fused = trained(folder, method, method)
    plain = trained(folder, f"{method}-plain", method, lora_qkv_kernel=False, lora_o_kernel=False)
    assert fused == pytest.approx(plain, rel=1e-5)
    half = str(folder / method / "checkpoint-2")
    again = trained(folder, f"{method}-again", method, resume_from_checkpoint=half)
    assert again == pytest.approx(fused, rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, folder / method).eval()(ids).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4
