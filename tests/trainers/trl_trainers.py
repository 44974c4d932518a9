"""TRL's trainers over a tiny model and one set of ragged texts, each as a user builds it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.adapters import tiny
from tests.life.sft import dataset
from tests.life.words import WORDS, tokenizer

ROWS = 16
STEPS = 2


def _answer(index: int, *, odd: bool) -> str:
    return " " + " ".join(WORDS[(6 * index + 2 * j) % 40 + odd] for j in range(1 + index % 3))


def pairs() -> Dataset:
    """Ragged prompts, each with a chosen answer of even words and a rejected one of odd words."""
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(WORDS[(i + j) % 40] for j in range(2 + i % 4)),
                "chosen": _answer(i, odd=False),
                "rejected": _answer(i + 7, odd=True),
            }
            for i in range(ROWS)
        ]
    )


def completions() -> Dataset:
    """The chosen answers alone."""
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs()])


def _whole_pairs() -> Dataset:
    return Dataset.from_list(
        [
            {"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]}
            for r in pairs()
        ]
    )


def _unpaired() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": r["prompt"],
                "completion": r["chosen" if i % 2 else "rejected"],
                "label": bool(i % 2),
            }
            for i, r in enumerate(pairs())
        ]
    )


def _even_words(completions: list[str], **kwargs: Any) -> list[float]:
    return [sum(int(w[1:]) % 2 == 0 for w in c.split() if w[1:].isdigit()) / 4 for c in completions]


def _settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
    } | changes


def _sft(form: str, **own: Any) -> Callable[..., Any]:
    def build(model: Any, folder: Path, lora: Any = None, **changes: Any) -> SFTTrainer:
        extra = {"completion_only_loss": True if form == "completion" else None}
        extra["assistant_only_loss"] = form == "chat"
        rows = completions() if form == "completion" else dataset(form)
        if own.get("streaming"):
            rows = rows.to_iterable_dataset()
        rest = {k: v for k, v in own.items() if k != "streaming"}
        return SFTTrainer(
            model=model,
            args=SFTConfig(**_settings(folder, **(extra | rest | changes))),
            train_dataset=rows,
            processing_class=tokenizer(),
            peft_config=lora,
        )

    return build


def _trl(trainer: Any, config: Any, rows: Callable[[], Dataset], **own: Any) -> Callable[..., Any]:
    def build(model: Any, folder: Path, lora: Any = None, **changes: Any) -> Any:
        words = tokenizer()
        arguments = {k: v for k, v in own.items() if k == "reward_funcs"}
        rest = {k: v for k, v in own.items() if k not in arguments}
        return trainer(
            model=model,
            args=config(**_settings(folder, **(rest | changes))),
            train_dataset=rows(),
            processing_class=words,
            peft_config=lora,
            **arguments,
        )

    return build


_ROLLOUT = {"num_generations": 4, "max_completion_length": 6, "reward_funcs": _even_words}
_ON_POLICY = _ROLLOUT | {"temperature": 1.0}

BUILDERS: dict[str, Callable[..., Any]] = {
    "sft": _sft("completion"),
    "sft-chat": _sft("chat"),
    "sft-packed": _sft("completion", packing=True, max_length=24),
    "sft-padding-free": _sft("completion", padding_free=True, max_length=None),
    "sft-streaming": _sft("completion", streaming=True),
    "dpo": _trl(DPOTrainer, DPOConfig, pairs),
    "dpo-precomputed": _trl(DPOTrainer, DPOConfig, pairs, precompute_ref_log_probs=True),
    "kto": _trl(KTOTrainer, KTOConfig, _unpaired),
    "orpo": _trl(ORPOTrainer, ORPOConfig, pairs, max_length=32),
    "reward": _trl(RewardTrainer, RewardConfig, _whole_pairs),
    "grpo": _trl(GRPOTrainer, GRPOConfig, pairs, **_ON_POLICY),
    "rloo": _trl(RLOOTrainer, RLOOConfig, pairs, **_ON_POLICY),
}


def base(kind: str) -> Any:
    if kind != "reward":
        return tiny.llama()
    from transformers import LlamaForSequenceClassification

    config = tiny.llama().config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).eval()


def build(kind: str, folder: Path, *, model: Any = None, **changes: Any) -> Any:
    """The trainer as a user builds it: with ``peft_config``, unless `model` is given."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    given = changes.pop("lora", None if model is not None else tiny.config(task_type=_task(kind)))
    return BUILDERS[kind](base(kind) if model is None else model, folder, given, **changes)


def _task(kind: str) -> str:
    return "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
