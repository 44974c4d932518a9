"""The kinds of models that the benchmark knows, each with its tasks and its standard budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.models import load_gemma, load_smollm2, minilm_folder
from benchmarks.quality.data.classification import FRESH as FRESH_LABELLED
from benchmarks.quality.data.classification import SENTIMENT, SHIFTS
from benchmarks.quality.data.reasoning import FRESH, KNOWN
from benchmarks.quality.models.packing import load_packed
from benchmarks.quality.models.vit import load_vit
from benchmarks.quality.training.adapters import Base
from benchmarks.quality.training.encoder import HEAD, StackedEncoder
from benchmarks.quality.training.gemma import StackedGemma
from benchmarks.quality.training.llama import StackedLlama
from lorainit.models.pretrained import load_whole


@dataclass(frozen=True)
class Kind:
    """One base model.

    Attributes:
        tasks: by name.
        load: from a folder (None: the cache's own) to a device.
        base: ``(model, dtype, fuse)`` to what the stacked trainer takes.
        defaults: fields of ``Experiment`` that differ from its own defaults.
        head: name of a module that is trained in full along with every adapter, if any.
        fresh_head: it is drawn anew from every seed.
    """

    tasks: tuple[str, ...]
    load: Callable[[Path | None, torch.device], nn.Module]
    base: Callable[[Any, torch.dtype, bool], Base]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    fresh_head: bool = False

    def adapter(self) -> dict[str, Any]:
        """What the LoraConfig says beside rank and scaling."""
        if self.head is None:
            return {"target_modules": "all-linear"}
        return {
            "target_modules": "all-linear",
            "exclude_modules": [self.head],
            "modules_to_save": [self.head],
        }

    @torch.no_grad()
    def seed_head(self, model: nn.Module, seed: int) -> None:
        """The new head of a seed, the same for every method; nothing where there is none."""
        if self.head is None or not self.fresh_head:
            return
        head = model.get_submodule(self.head)
        generator = torch.Generator().manual_seed(30_013 + seed)
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator))  # type: ignore[operator, union-attr, arg-type]
        head.bias.zero_()  # type: ignore[operator, union-attr]


def _smollm2(folder: Path | None, device: torch.device) -> nn.Module:
    if folder is not None:
        return load_packed(folder, device)
    return load_smollm2(device=device)


def _gemma(folder: Path | None, device: torch.device) -> nn.Module:
    if folder is not None:
        return load_packed(folder, device)
    return load_gemma(device=device)


def _minilm(folder: Path | None, device: torch.device) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    model = load_whole(
        AutoModelForSequenceClassification,
        str(folder or minilm_folder()),
        new_head=("classifier.",),
        num_labels=2,
        dtype=torch.float32,
    )
    result: nn.Module = model.to(device).eval()
    return result


def _vit(folder: Path | None, device: torch.device) -> nn.Module:
    return load_vit(folder, device)


def _encoder(model: nn.Module, dtype: torch.dtype, fuse: bool) -> Base:
    if dtype != torch.float32:
        raise ValueError("encoders are trained with precision='fp32'")
    return StackedEncoder(model, fuse=fuse)


KINDS: dict[str, Kind] = {
    "smollm2-135m-instruct": Kind(
        KNOWN,
        _smollm2,
        lambda model, dtype, fuse: StackedLlama(model, dtype, fuse=fuse),
    ),
    # After SmolLM2, whose tasks these are too: a call names it, by ``--set model=gemma-3-270m``.
    "gemma-3-270m": Kind(
        KNOWN,
        _gemma,
        lambda model, dtype, fuse: StackedGemma(model, dtype, fuse=fuse),
        {"model": "gemma-3-270m"},
    ),
    "all-minilm-l6-v2": Kind(
        tuple(SENTIMENT),
        _minilm,
        _encoder,
        {"model": "all-minilm-l6-v2", "precision": "fp32", "train_samples": 2048},
        HEAD,
        fresh_head=True,
    ),
    "vit-mnist": Kind(
        SHIFTS,
        _vit,
        _encoder,
        {"model": "vit-mnist", "precision": "fp32", "train_samples": 512},
        HEAD,
    ),
}
"""By the name that an experiment gives its model."""


def kind_of(model: str) -> Kind:
    """The kind of a model by its name in an experiment, quantized (``NAME+GRID``) or not."""
    return KINDS[model.partition("+")[0]]


FRESH_TASKS = frozenset(FRESH + FRESH_LABELLED)
"""Of all models: tasks that no choice was made on."""


def defaults(task: str) -> dict[str, Any]:
    """What an experiment on a task has in place of ``Experiment``'s own defaults."""
    return next((dict(k.defaults) for k in KINDS.values() if task in k.tasks), {})


def model_of(tasks: list[str]) -> str:
    """The one model that tasks share. Raises ``ValueError`` where they have several."""
    names = {defaults(task).get("model", "smollm2-135m-instruct") for task in tasks}
    if len(names) != 1:
        raise ValueError(f"one call trains one model; these tasks need {', '.join(sorted(names))}")
    return str(names.pop())
