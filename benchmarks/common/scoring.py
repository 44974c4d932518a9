"""Held-out loss and exact match of a causal language model, by one forward per batch.

A greedy decode gives the gold answer exactly when every answer token, the end token included, is
the argmax under the gold prefix: so exact match needs no generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.common.tasks import IGNORED, Collator, Example


@dataclass(frozen=True, eq=False)
class Scores:
    """One entry per sequence, in the order that was given.

    Attributes:
        losses: ``(n,)`` float64, the mean cross-entropy over the sequence's own label tokens.
        exact: ``(n,)`` bool, whether every label token is the model's first choice.
    """

    losses: Tensor
    exact: Tensor

    @property
    def loss(self) -> float:
        """Mean over sequences."""
        return self.losses.mean().item()

    @property
    def exact_match(self) -> float:
        """Share of sequences answered exactly."""
        return self.exact.double().mean().item()


def sequence_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and exact matches, each ``(batch,)``, from logits ``(batch, length, vocabulary)``.

    Labels ``(batch, length)`` are the model's own, not shifted, -100 where nothing is predicted.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    tokens = counted.sum(1)
    if (tokens == 0).any():
        raise ValueError("a sequence has no label token, so it has neither loss nor answer")
    # Only positions that predict a label are read: a small share of a large tensor.
    chosen = logits[:, :-1][counted].float()
    gold = targets[counted]
    row = counted.nonzero()[:, 0]
    token_loss = F.cross_entropy(chosen, gold, reduction="none")
    zeros = torch.zeros(len(labels), device=logits.device)
    losses = zeros.index_add(0, row, token_loss) / tokens
    wrong = zeros.index_add(0, row, (chosen.argmax(-1) != gold).float())
    return losses, wrong == 0


@torch.no_grad()
def score_batches(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], *, device: torch.device | None = None
) -> Scores:
    """Scores of keyword batches with ``labels``; the model's mode is put back afterwards."""
    device = device or next(model.parameters()).device
    losses, exact = [], []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits
            batch_losses, batch_exact = sequence_scores(logits, batch["labels"].to(device))
            losses.append(batch_losses)
            exact.append(batch_exact)
    finally:
        model.train(training)
    if not losses:
        raise ValueError("there is nothing to score")
    return Scores(torch.cat(losses).double().cpu(), torch.cat(exact).cpu())


def score(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    collate: Collator,
    batch_size: int = 32,
    device: torch.device | None = None,
    progress: str | None = None,
) -> Scores:
    """Scores of tokenized examples; examples of like length share a batch, which saves padding.

    ``progress`` is the name of a progress bar; None shows none.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    starts = range(0, len(order), batch_size)
    bar = tqdm(starts, desc=progress, unit="batch", leave=False, disable=progress is None)
    in_order = (collate([examples[i] for i in order[s : s + batch_size]]) for s in bar)
    scores = score_batches(model, in_order, device=device)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return Scores(scores.losses[back], scores.exact[back])
