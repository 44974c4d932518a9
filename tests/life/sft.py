"""An SFTTrainer run on a dataset of completions or of chats, with a tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import lorainit
from tests.adapters import tiny
from tests.life.words import texts, tokenizer

STEPS = 6
CUT = 3


def dataset(form: str) -> Dataset:
    """``"completion"``: prompt and completion; ``"chat"``: messages."""
    if form == "completion":
        return Dataset.from_list([{"prompt": q + " ", "completion": a} for q, a in texts()])
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": q},
                    {"role": "assistant", "content": a},
                ]
            }
            for q, a in texts()
        ]
    )


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= CUT:
            control.should_training_stop = True
        return control


def trainer(
    model: Any, folder: Path, form: str, *, stop: bool = False, **changes: Any
) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": CUT,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "completion_only_loss": True if form == "completion" else None,
        "assistant_only_loss": form == "chat",
        "dataset_num_proc": None,
        "seed": 7,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(settings | changes)),
        train_dataset=dataset(form),
        eval_dataset=dataset(form) if "eval_strategy" in changes else None,
        processing_class=tokenizer(),
        callbacks=[_Stop()] if stop else [],
    )


def batches(form: str, folder: Path) -> list[dict[str, Tensor]]:
    """What SFTTrainer itself feeds the model: its dataset, its collator, before any training."""
    loader = trainer(tiny.llama(), folder, form).get_train_dataloader()
    return [dict(batch) for batch in loader]


def started(kind: str, form: str, folder: Path) -> Any:
    """As a user's script starts it: statistics of the trainer's own batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return lorainit.get_peft_model(
        tiny.llama(),
        tiny.config(),
        method=tiny.METHODS[kind],
        data=batches(form, folder),
        progress=False,
    )


def run(model: Any, folder: Path, form: str, **settings: Any) -> list[float]:
    resume = settings.pop("resume", False)
    running = trainer(model, folder, form, **settings)
    running.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in running.state.log_history if "loss" in entry]
