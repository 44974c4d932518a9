"""SFT with TRL on any number of processes, DDP or FSDP2; lorainit runs inside the launch.

    accelerate launch --config_file examples/fsdp2.yaml examples/sft.py \\
        --model FOLDER --data train.jsonl --out adapter

Each line of the data is a JSON object with "prompt" and "completion". Every process starts the
adapter on its part of the data before the trainer shards anything; all find the same start.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lorainit
from lorainit.models.pretrained import load_whole


def measured(tokenizer: Any, lines: Any, length: int) -> list[dict[str, torch.Tensor]]:
    """A process's lines, one a batch, with labels on the completion alone."""
    found = []
    for line in lines:
        prompt = tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
        ids = (prompt + [*answer, tokenizer.eos_token_id])[:length]
        labels = ([-100] * len(prompt) + ids[len(prompt) :])[:length]
        found.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    # Before the model: this brings the process group up, and lorainit reduces over it.
    settings = SFTConfig(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        max_length=arguments.length,
        learning_rate=arguments.lr,
        per_device_train_batch_size=2,
        use_cpu=arguments.cpu,
        bf16=not arguments.cpu,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
    )
    state = PartialState()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # As from_pretrained, but a checkpoint that is not whole is an error.
    model = load_whole(
        AutoModelForCausalLM,
        arguments.model,
        dtype=torch.float32 if arguments.cpu else torch.bfloat16,
    ).to(state.device)
    lines = load_dataset("json", data_files=arguments.data, split="train")
    mine = lines.shard(num_shards=state.num_processes, index=state.process_index)

    config = LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear")
    model = lorainit.get_peft_model(
        model,
        config,
        method=lorainit.LoraDA(),
        data=measured(tokenizer, mine, arguments.length),
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=lines, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(arguments.out)
    # The processes leave their group together: one that only ends can take the others down.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
