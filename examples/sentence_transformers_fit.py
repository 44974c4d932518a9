"""sentence-transformers: ``add_adapter``, one line before ``train()``, and a model that loads as any other.

    python examples/sentence_transformers_fit.py --model FOLDER --data pairs.jsonl --out embedder

Each line of the data is a JSON object with "anchor" and "positive".
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

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

    model = SentenceTransformer(arguments.model, device="cpu" if arguments.cpu else None)
    # The model's own adapter: without it, what is saved would not load.
    model.add_adapter(
        LoraConfig(r=arguments.rank, lora_alpha=arguments.rank, target_modules="all-linear")
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=arguments.out,
            max_steps=arguments.steps,
            use_cpu=arguments.cpu,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        loss=MultipleNegativesRankingLoss(model),
    )
    lorainit.start_trainer(trainer, lorainit.LoraDA())
    trainer.train()
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
