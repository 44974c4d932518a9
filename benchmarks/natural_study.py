"""Which form of repeated natural steps closes most of the loss gap, without any training step.

    python -m benchmarks.natural_study --model FOLDER --gguf FILE --tokens tokens.npz --out out.jsonl

Variants: full steps cut back to rank r in the Fisher metric (the length searched before or after the
cut), steps in the tangent space of the rank-r matrices, and rank shared among the steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lorainit.statistics.displace import LowRank, displaced
from lorainit.statistics.losses import batch_loss
from torch import Tensor, nn

from lorainit.calibration import search_length
from lorainit.statistics import CollectSettings, collect
from lorainit.types import LayerStatistics

NEEDS = frozenset({"gradient", "input_second_moment", "output_second_moment"})


def batches(ids: np.ndarray, meta: np.ndarray, size: int, device: str) -> list[dict[str, Tensor]]:
    out = []
    for i in range(0, len(ids), size):
        length = int(meta[i : i + size, 1].max())
        x = torch.from_numpy(ids[i : i + size, :length].astype(np.int64))
        prompt, total = (torch.from_numpy(meta[i : i + size, j].astype(np.int64)) for j in (0, 1))
        at = torch.arange(length)[None]
        mask = at < total[:, None]
        labels = x.masked_fill(~mask | (at < prompt[:, None]), -100)
        out.append({"input_ids": x, "labels": labels, "attention_mask": mask.long()})
    return [{k: v.to(device) for k, v in b.items()} for b in out]


@torch.no_grad()
def mean_loss(model: nn.Module, data: list[dict[str, Tensor]], reduction: str) -> float:
    total = count = 0.0
    for batch in data:
        result = batch_loss(model, batch, reduction)  # type: ignore[arg-type]
        total += float(result.per_sequence.sum())
        count += float(result.label_tokens if reduction == "token" else result.sequences)
    return total / count


@torch.no_grad()
def evaluate(model: nn.Module, data: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean loss over sequences, and exact match by teacher forcing."""
    losses, right, n = 0.0, 0, 0
    for b in data:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        labels = b["labels"][:, 1:]
        token = nn.functional.cross_entropy(
            logits[:, :-1].float().mT, labels, ignore_index=-100, reduction="none"
        )
        counted = labels != -100
        losses += float((token.sum(1) / counted.sum(1)).sum())
        right += int(((logits[:, :-1].argmax(-1) == labels) | ~counted).all(1).sum())
        n += len(labels)
    return losses / n, right / n


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


def cholqr(x: Tensor) -> Tensor:
    for _ in range(2):
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(
            1e-14 * gram.diagonal(dim1=-2, dim2=-1).sum(-1, True) + 1e-300
        )
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, x, upper=True, left=False)
    return x


def top_svd(m: Tensor, k: int, iterations: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    v = torch.randn(m.shape[-1], k + 12, generator=gen, dtype=torch.float64).to(m)
    v = v.expand(*m.shape[:-2], *v.shape)
    for _ in range(iterations):
        v = cholqr(m.mT @ cholqr(m @ v))
    return small_svd(m @ v, v.mT, k)


def shrunk(m: Tensor, s: Tensor) -> Tensor:
    """Singular values with white noise taken out (Gavish, Donoho 2017, Frobenius loss)."""
    rows, columns = sorted(m.shape[-2:])
    k = s.shape[-1]
    noise = (m.square().sum((-2, -1)) - s.square().sum(-1)) / ((rows - k) * (columns - k))
    y = s / (noise * columns).sqrt()[:, None]
    beta = rows / columns
    inside = ((y.square() - beta - 1).square() - 4 * beta).clamp_min(0).sqrt() / y
    return (
        torch.where(y > 1 + beta**0.5, inside, torch.zeros_like(inside))
        * (noise * columns).sqrt()[:, None]
    )


def small_svd(left: Tensor, right: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k SVD of left @ right with few columns."""
    ql, qr = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(ql.R @ qr.R.mT)
    return (ql.Q @ u)[..., :k], s[..., :k], (qr.Q @ vh.mT)[..., :k]


@dataclass
class Group:
    """Layers of one shape: names, roots and whitened gradient, all stacked."""

    names: list[str]
    x_root: Tensor
    y_root: Tensor
    step: Tensor  # whitened, -Ly^-1 G Lx^-T


def groups_of(statistics: Any, damping: float) -> list[Group]:
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, layer in statistics.items():
        shapes.setdefault(tuple(layer.gradient_sum.shape), []).append(name)
    out = []
    for names in shapes.values():

        def root(field: str, names: list[str] = names) -> Tensor:
            s = torch.stack([getattr(statistics[n], field).double() for n in names])
            lam = damping * s.diagonal(dim1=-2, dim2=-1).mean(-1)
            s.diagonal(dim1=-2, dim2=-1).add_(lam[:, None])
            return torch.linalg.cholesky(s)

        g = torch.stack([statistics[n].gradient.double() for n in names])
        x, y = root("input_second_moment"), root("output_second_moment")
        half = torch.linalg.solve_triangular(y, -g, upper=False)
        m = torch.linalg.solve_triangular(x.mT, half, upper=True, left=False)
        out.append(Group(names, x, y, m))
    return out


def terms(groups: list[Group], lefts: list[Tensor], rights: list[Tensor]) -> dict[str, LowRank]:
    """Whitened factors mapped back, as displacements by layer."""
    out = {}
    for g, l, r in zip(groups, lefts, rights, strict=True):
        left = torch.linalg.solve_triangular(g.y_root.mT, l, upper=True).float()
        right = torch.linalg.solve_triangular(g.x_root, r, upper=False, left=False).float()
        for i, name in enumerate(g.names):
            out[name] = LowRank(left[i], right[i])
    return out


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
    def settings(needs: frozenset[str]) -> CollectSettings:
        return CollectSettings(
            needs,
            loss_reduction=reduction,
            token_mask=mask,
            max_sequences=None,
            progress=False,  # type: ignore[arg-type]
        )

    def statistics() -> dict[str, LayerStatistics]:
        if fisher == "empirical":
            return dict(collect(model, modules, fit, settings(NEEDS)))
        sampled = [with_sampled_labels(model, b, k) for b in fit]
        true = collect(model, modules, sampled, settings(frozenset({"output_second_moment"})))
        found = collect(model, modules, fit, settings(NEEDS - {"output_second_moment"}))
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
            loss = batch_loss(model, batch, "sequence").per_sequence.mean()
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tasks",
        default="chain_sum,letter_counting,gsm_symbolic,family_relationships,simple_equations",
    )
    parser.add_argument("--runs", default="cut:4:0.01:token:attention:empirical")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--test", type=int, default=1024)
    parser.add_argument("--time-limit", type=float, default=1e9)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    t0 = time.perf_counter()
    extra = {"gguf_file": args.gguf} if args.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra)
    model = model.to(args.device).eval().requires_grad_(False)
    print("loaded", round(time.perf_counter() - t0, 1), flush=True)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    data = np.load(args.tokens)
    out = Path(args.out)
    for spec in args.runs.split(","):
        variant, steps, damping, reduction, mask, fisher = spec.split(":")
        dampings = [float(d) for d in damping.split("/")]
        for task in args.tasks.split(","):
            for seed in args.seeds.split(","):
                if time.perf_counter() - t0 > args.time_limit:
                    return
                key = f"{task}/statistics/{seed}"
                ids, meta = (
                    data[key + "/ids"][: args.sequences],
                    data[key + "/meta"][: args.sequences],
                )
                held = np.arange(len(ids)) % 5 == 4
                test_ids, test_meta = (
                    data[f"{task}/test/0/{x}"][: args.test] for x in ("ids", "meta")
                )
                test = batches(test_ids, test_meta, 256, args.device)
                common = {
                    "task": task,
                    "seed": int(seed),
                    "variant": variant,
                    "steps": int(steps),
                    "damping": damping,
                    "reduction": reduction,
                    "rank": args.rank,
                    "mask": mask,
                    "fisher": fisher,
                }
                loss, match = evaluate(model, test)
                rows = [{**common, "k": 0, "loss": loss, "match": match}]
                if variant == "lora":
                    source = (ids, meta)
                    if mask == "train":
                        source = (data[f"{task}/train/0/ids"], data[f"{task}/train/0/meta"])
                    results = train_lora(
                        model,
                        modules,
                        batches(*source, 32, args.device),
                        batches(ids[held], meta[held], args.batch, args.device),
                        test,
                        rank=args.rank,
                        steps=int(steps),
                        lr=dampings[0],
                        report=int(fisher),
                    )
                else:
                    results = run(
                        model,
                        modules,
                        batches(ids[~held], meta[~held], args.batch, args.device),
                        batches(ids[held], meta[held], args.batch, args.device),
                        test,
                        rank=args.rank,
                        steps=int(steps),
                        variant=variant,
                        dampings=dampings,
                        reduction=reduction,
                        mask=mask,
                        fisher=fisher,
                        report={1, 2, 4, 8, int(steps)},
                    )
                for row in results:
                    rows.append({**common, **row})
                with out.open("a") as f:
                    for row in rows:
                        f.write(json.dumps(row) + "\n")
                        print(
                            spec,
                            task,
                            *(
                                f"{k}={row[k]:.3f}"
                                for k in ("k", "loss", "match", "seconds", "held", "fit")
                                if k in row
                            ),
                            row.get("damping_chosen"),
                            flush=True,
                        )


if __name__ == "__main__":
    main()
