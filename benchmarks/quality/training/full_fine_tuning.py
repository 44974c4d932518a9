"""Full fine-tuning: the upper line. One plain loop a run, every weight trained, no adapter."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.scoring import sequence_scores
from benchmarks.quality.data.classification import LabelledPool
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.training.trainer import Outcome, schedule


def train_full(
    model: nn.Module,
    train: Pool,
    order: Tensor,
    *,
    learning_rate: float,
    warmup: float,
    clip: float,
    bfloat16: bool,
    curve: Pool,
    curve_at: Sequence[int],
    scores: Mapping[str, Pool],
    start_scores: Mapping[str, Pool] | None = None,
) -> Outcome:
    """Train a copy of the model as `StackTrainer` trains adapters: same data, schedule, optimizer.

    Args:
        model: read, never changed.
        train: the pool that the rows of `order`, ``(steps, batch)``, are taken from.
        bfloat16: under autocast; the weights themselves stay float32.
        learning_rate, warmup, clip: see ``Experiment``.
        curve, curve_at, scores, start_scores: see ``StackTrainer.run``.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    device = next(model.parameters()).device
    cast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, weight_decay=0.0, fused=device.type == "cuda"
    )
    outcome, losses = Outcome(), []
    with cast:
        outcome.start_scores = {k: score(model, p) for k, p in (start_scores or {}).items()}
    factors = schedule(len(order), warmup).tolist()
    for step in range(len(order) + 1):
        if step in curve_at:
            began = _now(device)
            with cast:
                outcome.curve[step] = float(score(model, curve)[0].mean())
            outcome.evaluate_seconds += _now(device) - began
        if step == len(order):
            break
        began = _now(device)
        (batch,) = train.batches(order[step].tolist(), order.shape[1])
        with cast:
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factors[step]
        optimizer.step()
        losses.append(loss.detach())
        outcome.train_seconds += _now(device) - began
    with cast:
        outcome.scores = {name: score(model, pool) for name, pool in scores.items()}
    outcome.train_loss = torch.stack(losses).float().tolist() if losses else []
    numbers = outcome.train_loss + list(outcome.curve.values())
    numbers += [float(v[0].mean()) for v in outcome.scores.values()]
    outcome.finite = all(map(math.isfinite, numbers))
    return outcome


@torch.no_grad()
def score(model: nn.Module, pool: Pool, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Loss and correctness of every row, each ``(n,)`` on the CPU."""
    losses, exact = [], []
    device = next(model.parameters()).device
    for batch in pool.batches(range(len(pool)), batch_size):
        labels = batch.pop("labels").to(device)
        logits = model(**{k: v.to(device) for k, v in batch.items()}).logits
        if isinstance(pool, LabelledPool):
            losses.append(F.cross_entropy(logits.float(), labels, reduction="none").cpu())
            exact.append((logits.argmax(-1) == labels).float().cpu())
        else:
            loss, right = sequence_scores(logits, labels)
            losses.append(loss.cpu())
            exact.append(right.float().cpu())
    return torch.cat(losses), torch.cat(exact)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
