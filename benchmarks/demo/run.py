"""One line, start to end: initialize, find a rate, train with the stock Trainer, score, save, reload."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

import lorainit
from benchmarks.common.cache import REPOSITORY
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer, smollm2_folder
from benchmarks.common.scoring import Scores, score
from benchmarks.common.tasks import (
    Collator,
    Example,
    batches,
    check_disjoint,
    make_examples,
)
from benchmarks.demo.settings import Entry, Settings

RELOAD_TOLERANCE = 1e-3
"""Largest difference of a logit after reloading; logits are about 30, arithmetic is float32."""


@dataclass(frozen=True)
class Data:
    """The demo's problems, tokenized; the three splits share no text."""

    train: list[Example]
    test: list[Example]
    statistics: list[Example]
    collate: Collator


def load_data(settings: Settings) -> Data:
    """Make the problems, or read them from the cache."""
    tokenizer = load_smollm2_tokenizer()
    sizes = {
        "train": settings.steps * settings.batch_size,
        "test": settings.held_out,
        "statistics": settings.statistics_sequences,
    }
    examples = {
        split: make_examples(
            settings.task,
            split,
            size,
            tokenizer=tokenizer,
            seed=settings.seed,
            max_length=settings.max_length,
        )
        for split, size in sizes.items()
    }
    check_disjoint(**examples)
    return Data(**examples, collate=Collator(tokenizer.pad_token_id))


def run_base(settings: Settings, data: Data) -> dict[str, object]:
    """Held-out scores of the base model, without any adapter."""
    return {"held_out": [_point(0, score_held_out(load_smollm2(), settings, data, "Base"))]}


def run_method(settings: Settings, entry: Entry, data: Data, folder: Path) -> dict[str, object]:
    """The whole line for one method; the adapter is left in ``folder/adapter``."""
    set_seed(settings.seed)
    config = adapter_config(settings)
    reads_data = bool(entry.method.needs)
    prompts = batches(data.statistics, settings.statistics_batch, data.collate)
    base = load_smollm2()
    clock = Clock()
    clock.start()
    model = lorainit.get_peft_model(
        base, config, method=entry.method, data=prompts if reads_data else None
    )
    rate = entry.rate or float(
        lorainit.suggest_learning_rate(model, prompts, max_sequences=settings.rate_sequences)
    )
    clock.stop()

    recorder = _train(model, settings, rate, entry.label, data)
    _check_base_unchanged(model)
    model.save_pretrained(folder / "adapter")
    # What PEFT started itself it loads itself; it is what was started here that has to be shown.
    reloaded = _reload(model, data, folder) if reads_data else None
    return {
        "method": entry.name,
        "label": entry.label if entry.rate else f"{entry.label} at {rate:.1g}, suggested",
        "learning_rate": rate,
        "settings": {"class": type(entry.method).__name__, **asdict(entry.method)},
        "init_seconds": clock.wall,
        "init_cpu_seconds": clock.cpu,
        "train_seconds": recorder.train_seconds,
        "train_cpu_seconds": recorder.train_cpu_seconds,
        "train_loss": recorder.train_loss,
        "held_out": recorder.held_out,
        "base_unchanged": True,
        "reload": reloaded,
        "adapter_bytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def adapter_config(settings: Settings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


class Clock:
    """Wall-clock and processor seconds between `start` and `stop`, added up."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def start(self) -> None:
        self._from = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self._from[0]
        self.cpu += time.process_time() - self._from[1]


class _Recorder(TrainerCallback):
    """Keeps every step's loss, scores the held-out problems on the way, and shows one bar."""

    def __init__(self, settings: Settings, label: str, data: Data) -> None:
        self._settings, self._label, self._data = settings, label, data
        self._spent = Clock()
        self.train_seconds = 0.0
        self.train_cpu_seconds = 0.0
        self.train_loss: list[float] = []
        self.held_out: list[dict[str, float]] = []

    def score(self, model: PeftModel, step: int) -> None:
        scores = score_held_out(model, self._settings, self._data, f"{self._label}: held-out")
        self.held_out.append(_point(step, scores))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.score(model, 0)
        self._bar = tqdm(total=state.max_steps, desc=f"{self._label}: training", unit="step")
        self._spent.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.train_loss.append(float(logs["loss"]))
            self._bar.set_postfix(loss=f"{self.train_loss[-1]:.3f}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._bar.update()
        if state.global_step in self._settings.scored_at:
            self._spent.stop()
            self.score(model, state.global_step)
            self._spent.start()

    def on_train_end(self, args, state, control, **kwargs):
        self._spent.stop()
        self.train_seconds, self.train_cpu_seconds = self._spent.wall, self._spent.cpu
        self._bar.close()


def _train(model: PeftModel, settings: Settings, rate: float, label: str, data: Data) -> _Recorder:
    """A short fine-tune with the stock Trainer; the order of the data hangs on the seed alone."""
    arguments = TrainingArguments(
        output_dir=str(REPOSITORY / "outputs" / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=settings.seed,
        data_seed=settings.seed,
    )
    recorder = _Recorder(settings, label, data)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collate,
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder


def score_held_out(model: torch.nn.Module, settings: Settings, data: Data, progress: str) -> Scores:
    return score(
        model, data.test, collate=data.collate, batch_size=settings.score_batch, progress=progress
    )


def _point(step: int, scores: Scores) -> dict[str, float]:
    return {"step": step, "loss": scores.loss, "exact_match": scores.exact_match}


def _check_base_unchanged(model: PeftModel) -> None:
    """Every weight of the base, bit for bit, against a fresh copy from disk."""
    now = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.named_parameters()
    }
    fresh: dict[str, Tensor] = dict(load_smollm2().named_parameters())
    changed = [name for name, tensor in fresh.items() if not torch.equal(now[name], tensor)]
    if changed:
        raise RuntimeError(f"base weights changed in training: {changed[:3]} ...")


@torch.no_grad()
def _reload(model: PeftModel, data: Data, folder: Path) -> dict[str, object]:
    """Logits of the live model against stock PEFT's in another process, which must agree."""
    probe = data.collate(data.test[:8])
    inputs = {name: probe[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    path = folder / "probe.safetensors"
    save_file({**inputs, "logits": model(**inputs).logits.contiguous()}, path)
    command = [sys.executable, "-m", "benchmarks.demo.reload"]
    command += [str(smollm2_folder()), str(folder / "adapter"), str(path)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    path.unlink()
    if process.returncode:
        raise RuntimeError(f"stock PEFT could not load the adapter:\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    if result["max_abs_diff"] > RELOAD_TOLERANCE or result["lorainit_imported"]:
        raise RuntimeError(f"the saved adapter does not give the live model's logits: {result}")
    return result
