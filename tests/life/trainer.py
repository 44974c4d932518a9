"""A Trainer run that can be cut anywhere, for the tests and the processes that they start."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.adapters import tiny

STEPS = 6
CUT = 3


class Rows(Dataset[dict[str, Tensor]]):
    """Sixteen ragged rows."""

    def __init__(self, seed: int = 3) -> None:
        self.batch = tiny.batch(rows=16, seed=seed)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


class _Stop(TrainerCallback):
    """The plug is pulled after this many steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step >= self.at:
            control.should_training_stop = True
        return control


class _Kill(TrainerCallback):
    """The process ends at once: nothing is flushed, saved or closed."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.values.append(logs["loss"])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": CUT,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return TrainingArguments(**(settings | changes))


def run(
    model: Any,
    folder: Path,
    *,
    stop: int | None = None,
    kill: int | None = None,
    resume: bool | str = False,
    evaluate: bool = False,
    **changes: Any,
) -> list[float]:
    """Train, and give the loss of every step."""
    losses = _Losses()
    trainer = Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Rows(),
        eval_dataset=Rows(seed=8) if evaluate else None,
        callbacks=[losses] + ([_Stop(stop)] if stop else []) + ([_Kill(kill)] if kill else []),
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses.values


def started(kind: str, **changes: Any) -> Any:
    """As a user's script starts it: the same every time it is run."""
    return tiny.start(tiny.llama(), tiny.METHODS[kind], tiny.config(lora_dropout=0.1, **changes))


def result(model: Any, losses: list[float]) -> dict[str, Any]:
    """What is compared over processes, exactly: json keeps every digit of a double."""
    return {"losses": losses, "logits": tiny.logits(model).double().flatten().tolist()}


def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
