"""Plain LoRA trained on the same few sequences, which the starts compete with."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.natural_steps.displacement import (
    LowRank,
    displaced,
    evaluate,
    mean_loss,
    sequence_losses,
)


def train_lora(
    model: nn.Module,
    modules: dict[str, nn.Module],
    fit: list[dict[str, Tensor]],
    held: list[dict[str, Tensor]],
    test: list[dict[str, Tensor]],
    *,
    rank: int,
    steps: int,
    lr: float,
    report: int,
) -> Iterable[dict[str, Any]]:
    """Plain LoRA by Adam on the same few sequences: what the starts compete with."""
    torch.manual_seed(0)
    scaling = 16 / rank**0.5
    pairs = {}
    for n, m in modules.items():
        a = (torch.rand(rank, m.in_features, device=m.weight.device) * 2 - 1) / m.in_features**0.5
        b = torch.zeros(m.out_features, rank, device=m.weight.device)
        pairs[n] = (b.requires_grad_(), a.requires_grad_())
    params = [p for pair in pairs.values() for p in pair]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=params[0].is_cuda)
    started, spent = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        batch = fit[(step - 1) % len(fit)]
        rate = lr * min(1.0, step / 6) * (1 - (step - 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with displaced(modules, {n: LowRank(b * scaling, a) for n, (b, a) in pairs.items()}):
            loss = sequence_losses(model, batch).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % report == 0:
            t0 = time.perf_counter()
            now = {n: LowRank(b.detach() * scaling, a.detach()) for n, (b, a) in pairs.items()}
            with displaced(modules, now):
                value, match = evaluate(model, test)
                held_loss = mean_loss(model, held, "sequence")
                fit_loss = mean_loss(model, fit, "sequence")
            spent += time.perf_counter() - t0
            yield {
                "k": step,
                "loss": value,
                "match": match,
                "held": held_loss,
                "fit": fit_loss,
                "seconds": time.perf_counter() - started - spent,
            }
