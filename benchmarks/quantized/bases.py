"""The models of the benchmark on quantized bases: how each is loaded, what it is measured by.

A model more is a row of `BASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.models import (
    load_gemma_tokenizer,
    load_minilm,
    load_minilm_tokenizer,
    load_smollm2_tokenizer,
)
from benchmarks.quality.choose import CHOSEN
from benchmarks.quality.data.classification import SENTIMENT
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.models.registry import KINDS
from benchmarks.quantized.measures import (
    Batch,
    Distances,
    Measure,
    Predictions,
    along_directions,
    with_directions,
)
from benchmarks.quantized.token_rows import HEAD, TEXT, divided

TASKS = CHOSEN[:6]
"""Of language models, those that quantized bases are trained on as well (docs/quantized.md)."""


@dataclass(frozen=True)
class Case:
    """One model on one data set.

    Attributes:
        full: in full precision.
        data: batches for the statistics.
        measure: of a model, on other rows of the same data.
        adapter: what the LoraConfig says beside rank and scaling.
        collect: how statistics are collected, keywords of ``collect_statistics``.
    """

    full: nn.Module
    data: list[dict[str, Tensor]]
    measure: Measure
    adapter: Mapping[str, Any]
    collect: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """What a case is made of.

    Attributes:
        pools: rows by data set.
        rows: for the statistics.
        held_out: to measure on.
        size: rows a batch.
        device: of model and data.
        folder: of the model, None for the benchmarks' own cache.
    """

    pools: Mapping[str, Pool]
    rows: int
    held_out: int
    size: int
    device: torch.device
    folder: Path | None = None

    def of(self, data: str) -> tuple[list[Any], list[Any]]:
        """Batches for the statistics and to measure on."""
        return divided(self.pools[data].to(self.device), self.rows, self.held_out, self.size)


@dataclass(frozen=True)
class Base:
    """A model.

    Attributes:
        title: its name in the records.
        tokenizer: what its rows are made with, where it is at hand.
        case: the model on one data set.
        tasks: data sets beside text.
        encoder: sentences with a class, not prompts with an answer.
    """

    title: str
    tokenizer: Callable[[], Any]
    case: Callable[[Split, str], Case]
    tasks: tuple[str, ...] = TASKS
    encoder: bool = False


@cache
def _language_model(kind: str, folder: Path | None, device: torch.device) -> nn.Module:
    return KINDS[kind].load(folder, device)


def language_case(kind: str, split: Split, data: str) -> Case:
    """A causal language model of the quality benchmark's `KINDS`, measured by its predictions."""
    full = _language_model(kind, split.folder, split.device)
    batches, held = split.of(data)
    return Case(full, batches, Predictions(full, held), {"target_modules": "all-linear"})


def encoder_case(split: Split, data: str) -> Case:
    """MiniLM: on text its embeddings, on sentences with classes the predictions of a fitted head."""
    batches, held = split.of(data)
    if data == TEXT:
        encoder = load_minilm(device=split.device)
        # Its pooler gives what the embeddings do not read.
        adapter = {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]}
        seen = with_directions(batches, encoder.config.hidden_size)
        collect = {"loss_fn": along_directions, "max_sequences": None}
        return Case(encoder, seen, Distances(encoder, held), adapter, collect)
    full: nn.Module = load_minilm(num_labels=2, device=split.device)
    pool = split.pools[data + HEAD].to(split.device)
    fit_head(full, pool.batches(range(len(pool)), split.size))
    adapter = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}
    return Case(full, batches, Predictions(full, held), adapter)


def fit_head(model: nn.Module, batches: list[Batch], decay: float = 1e-3) -> float:
    """Fit a classifier's last layer to the features of the full-precision model; the loss that is left.

    Least cross-entropy plus ``decay |w|^2``, in float64: one minimum, whatever the head was before.
    """
    head: Any = model.get_submodule("classifier")
    features, classes = [], []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        features.append(inputs[0].detach().double())

    hook = head.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            for batch in batches:
                model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
                classes.append(batch["labels"])
    finally:
        hook.remove()
    inputs, labels = torch.cat(features), torch.cat(classes)
    weight = inputs.new_zeros(head.weight.shape, requires_grad=True)
    bias = inputs.new_zeros(head.bias.shape, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight.mT + bias, labels)
        loss = loss + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return float(closure().detach())


BASES: dict[str, Base] = {
    "smollm2": Base(
        "SmolLM2-135M", load_smollm2_tokenizer, partial(language_case, "smollm2-135m-instruct")
    ),
    "gemma": Base("Gemma-3-270M", load_gemma_tokenizer, partial(language_case, "gemma-3-270m")),
    "minilm": Base(
        "all-MiniLM-L6-v2", load_minilm_tokenizer, encoder_case, tuple(SENTIMENT), encoder=True
    ),
}
"""By the name that the command line takes."""
