"""One line between building a trainer and ``train()``: supervised fine-tuning, or preferences.

    python examples/start_trainer.py --model FOLDER --data train.jsonl --out adapter

Each line of the data is a JSON object with "prompt" and "completion"; or with "prompt", "chosen" and
"rejected", for DPO.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lorainit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    lines = load_dataset("json", data_files=arguments.data, split="train")
    preferences = "chosen" in lines.column_names
    settings: dict[str, Any] = {
        "output_dir": arguments.out,
        "max_steps": arguments.steps,
        "use_cpu": arguments.cpu,
        "bf16": not arguments.cpu,
        "logging_steps": 1,
        "report_to": [],
    }
    if preferences:
        # TRL's default, 1e-6, is for training all weights. For supervised training a rate is measured.
        settings["learning_rate"] = 3e-4
    build, config = (DPOTrainer, DPOConfig) if preferences else (SFTTrainer, SFTConfig)
    trainer = build(
        model=AutoModelForCausalLM.from_pretrained(arguments.model),
        args=config(**settings),
        train_dataset=lines,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(
            r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear"
        ),
    )
    lorainit.start_trainer(trainer, lorainit.LoraDA())
    trainer.train()
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
