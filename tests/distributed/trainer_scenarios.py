"""What each process does with a trainer: started at the door, trained, saved, and the ready model beside it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lorainit
from lorainit.parallel.partitioned import whole as gathered
from tests.distributed import sharded_on_cpu
from tests.distributed.scenarios import METHODS, whole
from tests.life.words import tokenizer
from tests.statistics import models

STEPS = 4
HALF = 2

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What ``accelerate launch --config_file examples/fsdp2.yaml`` sets."""

ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def texts(count: int = 16) -> list[dict[str, str]]:
    """Ragged prompts and completions."""
    words = [f"w{i}" for i in range(40)]
    return [
        {
            "prompt": " ".join(words[(i + j) % 40] for j in range(2 + i % 4)) + " ",
            "completion": " ".join(words[(3 * i + j) % 40] for j in range(1 + i % 3)),
        }
        for i in range(count)
    ]


def lines() -> list[dict[str, Tensor]]:
    """Token ids of one length, as a Trainer takes them."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 40, (16, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def set_up(kind: str, rank: int, size: int, folder: str) -> None:
    """The environment of a launcher, and a base model to load."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    if kind != "zero3":
        # Accelerate does not take DeepSpeed's part on what it knows to be a CPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    logging.disable(logging.WARNING)
    if kind == "fsdp2":
        os.environ |= FSDP2
        AcceleratorState.__init__ = sharded_on_cpu._sharding  # type: ignore[method-assign]
        accelerator.fsdp2_prepare_model = sharded_on_cpu._counted
    if kind == "zero3":
        from tests.distributed.zero3_scenarios import deepspeed

        deepspeed()
    if rank == 0:
        models.llama(vocab_size=len(tokenizer())).save_pretrained(folder)
    if size > 1:
        dist.barrier()


def build(which: str, kind: str, folder: str, out: str, ready: str | None = None) -> Any:
    """A trainer, as its user builds it: over a base model, or over a started adapter in a folder."""
    settings: dict[str, Any] = {
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 if kind == "alone" else 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_steps": HALF,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "seed": 7,
        "deepspeed": ZERO3 if kind == "zero3" else None,
    }
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    # After the arguments, which tell transformers how to load a model.
    if which == "Trainer":
        arguments = TrainingArguments(**settings)
        base = AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(0)
        model = lorainit.load_adapter(base, ready) if ready else _with_adapter(base, lora)
        return Trainer(model=model, args=arguments, train_dataset=lines())  # type: ignore[arg-type]
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**settings, bf16=False, completion_only_loss=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return SFTTrainer(
        model=lorainit.load_adapter(model, ready) if ready else model,
        args=arguments,
        train_dataset=Dataset.from_list(texts()),
        processing_class=tokenizer(),
        peft_config=None if ready else lora,
    )


def _with_adapter(base: Any, lora: LoraConfig) -> Any:
    from peft import get_peft_model

    return get_peft_model(base, lora)


def factors(model: Any) -> dict[str, Tensor]:
    """The trained halves of the adapter, gathered wherever they are."""
    learning = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with gathered(learning.values()):
        return {n: whole(p) for n, p in learning.items()}


def losses_of(trainer: Any) -> list[float]:
    return [float(e["loss"]) for e in trainer.state.log_history if "loss" in e]


def trained(
    rank: int, size: int, which: str, kind: str, name: str, folder: str
) -> Mapping[str, Any]:
    """A start at the door and the training after it; the ready model's; and a run that resumes."""
    set_up(kind, rank, size, f"{folder}/base")
    door = build(which, kind, f"{folder}/base", f"{folder}/door")
    lorainit.start_trainer(door, METHODS[name](), progress=False)
    start = factors(door.model)
    if rank == 0:
        lorainit.save_adapter(door.model, f"{folder}/start")
    if size > 1:
        dist.barrier()
    door.train()
    found: dict[str, Any] = {"start": start, "losses": losses_of(door)}
    found["learned"] = factors(door.model)
    if kind == "alone":
        return found
    beside = build(which, kind, f"{folder}/base", f"{folder}/ready", ready=f"{folder}/start")
    beside.train()
    found["ready"] = {"losses": losses_of(beside), "learned": factors(beside.model)}
    again = build(which, kind, f"{folder}/base", f"{folder}/again")
    lorainit.start_trainer(again, METHODS[name](), progress=False)
    again.train(resume_from_checkpoint=f"{folder}/door/checkpoint-{HALF}")
    found["resumed"] = {"losses": losses_of(again), "learned": factors(again.model)}
    return found
