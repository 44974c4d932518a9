"""What is measured of a model beside the full-precision one: its predictions, or its sentence embeddings.

A language model and a classifier predict: ``KL(full || model)`` a position (or a sentence), and the loss.
A sentence encoder has no head to predict with; what it is used for are the cosines of its embeddings. Its
measure is ``1 - cos`` between the model's embedding of a row and the full-precision model's, a mean over rows.
That is half the squared distance of the normalized embeddings, and so the KL between two unit Gaussians around
them: the same quantity as a language model's, for a model that gives a point and not a distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]

DRAWS = 2
"""How many random directions an encoder's embedding of a row is seen along."""


class Measure(Protocol):
    """Figures of a model on held-out rows, by name."""

    def __call__(self, model: nn.Module) -> dict[str, float]: ...


class Predictions:
    """``"kl"`` to the full-precision model and ``"loss"``, means over labelled positions."""

    def __init__(self, full: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.wanted = [log_probabilities(full, batch)[0] for batch in batches]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        total = torch.zeros(3, dtype=torch.float64)
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            found, labels = log_probabilities(model, batch)
            kl = (wanted.exp() * (wanted - found)).sum(-1).sum()
            loss = -found.gather(1, labels.unsqueeze(1)).sum()
            total += torch.tensor([float(kl), float(loss), len(labels)], dtype=torch.float64)
        return {"kl": float(total[0] / total[2]), "loss": float(total[1] / total[2])}


class Distances:
    """``"distance"``: ``1 - cos`` to the full-precision model's sentence embeddings, a mean over rows."""

    def __init__(self, full: nn.Module, batches: Sequence[Batch]) -> None:
        self.batches = batches
        with torch.no_grad():
            self.wanted = [embeddings(full.eval(), batch) for batch in batches]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        found = [
            # Not as 1 - cos, which rounding would drown: half of the squared distance is the same.
            (embeddings(model, batch) - wanted).double().square().sum(-1) / 2
            for batch, wanted in zip(self.batches, self.wanted, strict=True)
        ]
        return {"distance": float(torch.cat(found).mean())}


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """``(n, values)`` where a label is to be predicted, and those labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model.eval()(**inputs).logits, batch["labels"]
    if labels.dim() == 1:
        return logits.float().log_softmax(-1), labels
    labels = labels[:, 1:]
    kept = labels != -100
    return logits[:, :-1][kept].float().log_softmax(-1), labels[kept]


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """``(rows, width)``: the mean over a row's tokens, normalized, as sentence-transformers takes it."""
    mask = batch["attention_mask"]
    states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    found: Tensor = nn.functional.normalize(mean, dim=-1)
    return found


def with_directions(batches: Sequence[Batch], width: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Each row `DRAWS` times, every time with a Gaussian ``"direction"``; without labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        for _ in range(DRAWS):
            direction = torch.randn(len(batch["input_ids"]), width, generator=generator)
            kept = {name: value for name, value in batch.items() if name != "labels"}
            found.append(kept | {"direction": direction.to(batch["input_ids"].device)})
    return found


def along_directions(model: nn.Module, batch: Any) -> Tensor:
    """``(rows,)``: each embedding along its direction.

    The second moment of its gradients is ``E[J^T J]``, ``J`` the embedding's Jacobian: the curvature of
    `Distances`, as that of a language model's KL comes of labels.
    """
    return (embeddings(model, batch) * batch["direction"]).sum(-1)
