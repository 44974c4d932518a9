"""Repeated natural steps in several forms, each step's length measured on held-back sequences."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from benchmarks.studies.natural_steps.displacement import (
    LowRank,
    displaced,
    evaluate,
    mean_loss,
    with_sampled_labels,
)
from benchmarks.studies.natural_steps.whitening import groups_of, shrunk, small_svd, terms, top_svd
from lorainit.calibration import search_length
from lorainit.types import LayerStatistics

NEEDS = frozenset({"gradient", "input_second_moment", "output_second_moment"})


def run(
    model: nn.Module,
    modules: dict[str, nn.Module],
    fit: list[dict[str, Tensor]],
    held: list[dict[str, Tensor]],
    test: list[dict[str, Tensor]],
    *,
    rank: int,
    steps: int,
    variant: str,
    dampings: list[float],
    reduction: str,
    mask: str,
    fisher: str,
    report: set[int],
) -> Iterable[dict[str, Any]]:
    config = LoraConfig(r=rank, target_modules=list(modules))

    def collect(data: list[dict[str, Tensor]], needs: frozenset[str]) -> lorainit.Statistics:
        return lorainit.collect_statistics(
            model,
            config,
            data=data,
            needs=needs,
            loss_reduction=reduction,  # type: ignore[arg-type]
            token_mask=mask,  # type: ignore[arg-type]
            max_sequences=None,
            progress=False,
        )

    def statistics() -> dict[str, LayerStatistics]:
        if fisher == "empirical":
            return dict(collect(fit, NEEDS))
        sampled = [with_sampled_labels(model, b, k) for b in fit]
        true = collect(sampled, frozenset({"output_second_moment"}))
        found = collect(fit, NEEDS - {"output_second_moment"})
        return {
            n: replace(s, output_second_moment_sum=true[n].output_second_moment_sum)
            for n, s in found.items()
        }

    current: dict[str, LowRank] = {}
    started = time.perf_counter()
    spent_eval = 0.0
    share = rank // steps if variant == "share" else rank
    if variant[-1].isdigit():
        variant, share = (
            variant.rstrip("0123456789"),
            int(variant.lstrip("abcdefghijklmnopqrstuvwxyz")),
        )
    firsts: dict[float, float] = {}
    for k in range(1, steps + 1):
        with displaced(modules, current):
            found = statistics()
            base = mean_loss(model, held, reduction)
        best = None
        for damping in dampings:
            groups = groups_of(found, damping)
            now: list[tuple[Tensor, Tensor] | None] = []
            for g in groups:
                if not current:
                    now.append(None)
                    continue
                left = g.y_root.mT @ torch.stack([current[n].left.double() for n in g.names])
                right = torch.stack([current[n].right.double() for n in g.names]) @ g.x_root
                now.append((left, right))
            dirs = []
            for g, have in zip(groups, now, strict=True):
                m = g.step
                if variant == "tangent" and have is not None:
                    u, _, v = small_svd(*have, rank)
                    mv = m @ v
                    dirs.append(
                        (torch.cat([u, mv - u @ (u.mT @ mv)], -1), torch.cat([u.mT @ m, v.mT], -2))
                    )
                else:
                    u, s, v = top_svd(m, share)
                    if variant == "shrink":
                        s = shrunk(m, s)
                    dirs.append((u * s[..., None, :], v.mT))

            def build(
                length: float, cut: bool, groups: Any = groups, now: Any = now, dirs: Any = dirs
            ) -> dict[str, LowRank]:
                lefts, rights = [], []
                for have, (dl, dr) in zip(now, dirs, strict=True):
                    left, right = dl * length, dr
                    if have is not None:
                        left, right = (
                            torch.cat([have[0], left], -1),
                            torch.cat([have[1], right], -2),
                        )
                    if cut and left.shape[-1] > rank:
                        u, s, v = small_svd(left, right, rank)
                        left, right = u * s[..., None, :], v.mT
                    lefts.append(left)
                    rights.append(right)
                return terms(groups, lefts, rights)

            def loss_at(length: float, cut: bool, build: Any = build, base: float = base) -> float:
                if length == 0:
                    return base
                with displaced(modules, build(length, cut)):
                    return mean_loss(model, held, reduction)

            search_cut = variant in ("cut", "tangent", "shrink")
            if damping not in firsts:
                unit = build(1.0, False)
                ratios = [
                    float((t.left @ t.right).norm() / modules[n].weight.norm())
                    for n, t in list(unit.items())[::7]
                ]
                firsts[damping] = 0.03 / float(np.median(ratios))
            result = search_length(
                lambda t, loss_at=loss_at, cut=search_cut: loss_at(t, cut),
                firsts[damping],
                precision=0.3 if len(dampings) == 1 else 1.0,
                start_loss=base,
                max_trials=14,
            )
            firsts[damping] = result.length or firsts[damping]
            if best is None or result.loss < best[0].loss:
                best = (result, build, damping)
        result, build, damping = best
        uncut = None
        if variant == "late" and k in report:
            t0 = time.perf_counter()
            with displaced(modules, build(result.length, False)):
                uncut = evaluate(model, test)
            spent_eval += time.perf_counter() - t0
        if result.length > 0:
            current = build(result.length, variant != "share")
        seconds = time.perf_counter() - started - spent_eval
        if k in report:
            t0 = time.perf_counter()
            with displaced(modules, current):
                loss, match = evaluate(model, test)
                fit_loss = mean_loss(model, fit, reduction)
            spent_eval += time.perf_counter() - t0
            yield {
                "k": k,
                "loss": loss,
                "match": match,
                "uncut": uncut,
                "seconds": seconds,
                "held": result.loss,
                "fit": fit_loss,
                "held_before": base,
                "length": result.length,
                "trials": len(result.trials),
                "damping_chosen": damping,
            }
