"""One DPO training from one start; the model, the pairs and the reference's log-probabilities are made once."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import DPOConfig, DPOTrainer

import lorainit
from benchmarks.preference.data import pairs
from lorainit.methods import METHODS

SUGGESTED = "suggested"


@dataclass(frozen=True)
class Settings:
    """What all runs of a file share.

    Attributes:
        task: the pairs are made of its questions.
        rank: of the adapters on every linear layer; ``alpha = rank``, rank-stabilized.
        steps: of training.
        batch: pairs in a step.
        pairs: to train on.
        held: pairs of each of the two sets that are not trained on.
        sequences: pairs that a start is measured on, at most.
        beta: DPO's.
    """

    task: str = "chain_sum"
    rank: int = 8
    steps: int = 200
    batch: int = 16
    pairs: int = 2048
    held: int = 512
    sequences: int = 256
    beta: float = 0.1


class _Trainer(DPOTrainer):  # type: ignore[misc]
    """TRL's, for pairs that are tokenized and carry the reference's log-probabilities."""

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        ready = "ref_chosen_logps" in dataset.column_names
        return dataset if ready else super()._prepare_dataset(dataset, *arguments)


class Bench:
    """A base model with its pairs, on which starts are trained one after the other.

    Args:
        folder: of the model and its tokenizer.
        settings: of all runs.
        cpu: float32 on the CPU, even where there is a GPU.
    """

    def __init__(self, folder: Path, settings: Settings, *, cpu: bool) -> None:
        self.settings, self.cpu = settings, cpu
        self.words = AutoTokenizer.from_pretrained(folder)
        dtype = torch.float32 if cpu else torch.bfloat16
        self.base: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        sizes = {"train": settings.pairs, "validation": settings.held, "test": settings.held}
        self.sets = {
            name: Dataset.from_list(pairs(settings.task, name, size))  # type: ignore[arg-type]
            for name, size in sizes.items()
        }
        with tempfile.TemporaryDirectory() as place:
            trainer = self._trainer(place, precompute_ref_log_probs=True)
        self.sets = {"train": trainer.train_dataset, **trainer.eval_dataset}

    def run(self, method: str, rate: str, seed: int) -> dict[str, Any]:
        """Losses, reward margins and accuracies after one training, and the times it took.

        Args:
            method: a name of ``METHODS``.
            rate: a number, or `SUGGESTED` for the one that comes with the start.
            seed: of the adapter's random part and of the order of the pairs.
        """
        set_seed(seed)
        own = {} if rate == SUGGESTED else {"learning_rate": float(rate)}
        with tempfile.TemporaryDirectory() as place:
            trainer = self._trainer(place, seed=seed, **own)
            # As `precompute_ref_log_probs=True` sets it: the reference's values are in the pairs.
            trainer.precompute_ref_logps = True
            before = trainer.args.learning_rate
            began = time.perf_counter()
            lorainit.start_trainer(
                trainer,
                METHODS[method](),
                max_sequences=self.settings.sequences,
                set_learning_rate=rate == SUGGESTED,
                progress=False,
            )
            started = time.perf_counter()
            used = trainer.args.learning_rate
            found: dict[str, Any] = {"rate": used, "start_seconds": started - began}
            if rate == SUGGESTED and used == before:
                return found
            trainer.train()
            found["train_seconds"] = time.perf_counter() - started
            trainer.evaluate()
        for split in ("validation", "test"):
            # TRL logs its metrics beside each set's loss, and does not return them.
            logs = trainer.state.log_history
            entry = next(e for e in reversed(logs) if f"eval_{split}_loss" in e)
            found[f"{split}_loss"] = entry[f"eval_{split}_loss"]
            for name in ("margins", "accuracies"):
                found[f"{split}_{name}"] = next(
                    value for key, value in entry.items() if key.endswith(f"rewards/{name}")
                )
        return found

    def _trainer(self, place: str, **arguments: Any) -> _Trainer:
        settings = self.settings
        trainer = _Trainer(
            model=copy.deepcopy(self.base),
            args=DPOConfig(
                output_dir=place,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch,
                per_device_eval_batch_size=4 * settings.batch,
                warmup_steps=max(1, settings.steps // 20),
                beta=settings.beta,
                gradient_checkpointing=False,
                bf16=not self.cpu,
                use_cpu=self.cpu,
                save_strategy="no",
                disable_tqdm=True,
                report_to=[],
                **arguments,
            ),
            train_dataset=self.sets["train"],
            eval_dataset={name: self.sets[name] for name in ("validation", "test")},
            processing_class=self.words,
            peft_config=LoraConfig(
                r=settings.rank,
                lora_alpha=settings.rank,
                use_rslora=True,
                target_modules="all-linear",
            ),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer
