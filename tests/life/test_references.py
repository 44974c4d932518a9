"""TRL's DPO and KTO with the ready model: the reference is a copy that does not learn (CASES C1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests.adapters import tiny
from tests.life import sft

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def preferences() -> Dataset:
    pairs = sft.texts()
    rows = zip(pairs, reversed(pairs), strict=True)
    return Dataset.from_list(
        [{"prompt": q + " ", "chosen": a, "rejected": b} for (q, a), (_, b) in rows]
    )


def unpaired() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": q + " ", "completion": a, "label": bool(i % 2)}
            for i, (q, a) in enumerate(sft.texts())
        ]
    )


def of_adapter(model: Any, name: str) -> Tensor:
    active = model.active_adapter
    model.set_adapter(name)
    found = tiny.logits(model)
    model.set_adapter(active)
    return found


@pytest.mark.parametrize("algorithm", ["DPO", "KTO"])
@pytest.mark.parametrize("kind", ["anchored", "displaced"])
def test_the_reference_is_the_start(algorithm: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.train(tiny.start(tiny.llama(), tiny.METHODS[kind]))
    start = tiny.logits(model)
    trainer = getattr(trl, f"{algorithm}Trainer")(
        model=model,
        args=getattr(trl, f"{algorithm}Config")(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=preferences() if algorithm == "DPO" else unpaired(),
        processing_class=sft.tokenizer(),
    )
    assert "ref" in model.peft_config
    torch.testing.assert_close(of_adapter(model, "ref"), start, rtol=0, atol=0)
    trainer.train()
    torch.testing.assert_close(of_adapter(model, "ref"), start, rtol=0, atol=0)
    assert not torch.allclose(of_adapter(model, "default"), start, atol=1e-3)
    if algorithm == "DPO":
        # The policy begins at its reference: ln 2.
        first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert first == pytest.approx(0.693147, abs=1e-4)
