"""Lightning: the adapter starts when ``fit`` begins.

    python examples/lightning_fit.py --model FOLDER --data train.jsonl --out adapter

Each line of the data is a JSON object with "prompt" and "completion".
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorainit
from lorainit.integrations.lightning import StartAdapter


class FineTuning(LightningModule):
    def __init__(self, folder: str, rank: int, rate: float) -> None:
        super().__init__()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        self.rate = rate

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(learned, lr=self.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loader = lorainit.data.load_batches(arguments.data, tokenizer, batch_size=2)
    module = FineTuning(arguments.model, arguments.rank, arguments.lr)
    trainer = Trainer(
        max_steps=arguments.steps,
        callbacks=[StartAdapter(lorainit.LoraDA(), loss="model")],
        logger=False,
        enable_checkpointing=False,
        accelerator="auto",
    )
    trainer.fit(module, loader)
    module.model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
