"""A model displaced by low-rank terms, and its losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right``, ``(out, rank)`` times ``(rank, in)``, added to a layer's weight."""

    left: Tensor
    right: Tensor


@contextmanager
def displaced(modules: Mapping[str, nn.Module], terms: Mapping[str, LowRank]) -> Iterator[None]:
    """Inside, layers with a term compute ``W x + left (right x)``; no weight is changed."""

    def hook_of(term: LowRank) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + F.linear(F.linear(args[0], term.right), term.left)

        return hook

    with ExitStack() as stack:
        for name, term in terms.items():
            stack.callback(modules[name].register_forward_hook(hook_of(term)).remove)
        yield


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy ``(sequences, length - 1)``, where it counts, and where the answer is right."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().mT, labels, ignore_index=-100, reduction="none")
    return losses, labels != -100, logits[:, :-1].argmax(-1) == labels


def sequence_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """``(sequences,)``: mean over a sequence's label tokens."""
    losses, counted, _ = token_losses(model, batch)
    return losses.sum(1) / counted.sum(1)


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict[str, Tensor]], reduction: str) -> float:
    """Over label tokens (``"token"``), or over sequences of their means (``"sequence"``)."""
    total = count = 0.0
    for batch in data:
        losses, counted, _ = token_losses(model, batch)
        if reduction == "token":
            total, count = total + float(losses.sum()), count + float(counted.sum())
        else:
            total += float((losses.sum(1) / counted.sum(1)).sum())
            count += len(losses)
    return total / count


@torch.no_grad()
def evaluate(model: nn.Module, data: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean loss over sequences, and exact match by teacher forcing."""
    total, right, count = 0.0, 0, 0
    for batch in data:
        losses, counted, correct = token_losses(model, batch)
        total += float((losses.sum(1) / counted.sum(1)).sum())
        right += int((correct | ~counted).all(1).sum())
        count += len(losses)
    return total / count, right / count


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Labels drawn from the model's own predictions: the second moment is then the true Fisher's."""
    gen = torch.Generator(device=batch["input_ids"].device).manual_seed(seed)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=gen, device=logits.device)))
    drawn = (logits.float() + gumbel).argmax(-1)
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] != -100, drawn[:, :-1], labels[:, 1:])
    return {**batch, "labels": labels}
