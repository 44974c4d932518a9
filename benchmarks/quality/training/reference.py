"""The same training as anyone would write it: PEFT, autograd, ``torch.optim.AdamW``, one run.

It is what the stacked trainer is checked against.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.common.scoring import sequence_scores
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.training.trainer import schedule


def train_plain(
    model: nn.Module,
    pool: Pool,
    order: Tensor,
    *,
    learning_rate: float,
    warmup: float = 0.03,
    clip: float = 1.0,
) -> list[float]:
    """Train the model's trainable weights in place; returns the loss of every step's batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for rows, factor in zip(order, schedule(len(order), warmup).tolist(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        (batch,) = pool.batches(rows.tolist(), len(rows))
        loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def score_plain(model: nn.Module, pool: Pool, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Loss and exact match of every sequence, by the model's own forward with its mask."""
    losses, exact = [], []
    for batch in pool.batches(range(len(pool)), batch_size):
        labels = batch.pop("labels")
        batch_losses, batch_exact = sequence_scores(model(**batch).logits, labels)
        losses.append(batch_losses)
        exact.append(batch_exact)
    return torch.cat(losses), torch.cat(exact)
