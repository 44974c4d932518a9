"""``lorainit compare``: short training runs from several starts, each at its own best rate."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import time
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Subset
from tqdm.auto import tqdm

from lorainit.cli.shared import (
    class_of,
    load_model,
    load_records,
    lora_config,
    names_of,
    sample_arguments,
    speaking,
)
from lorainit.data import batches_of
from lorainit.errors import DataError
from lorainit.pipeline import collect_statistics, get_peft_model
from lorainit.statistics.batches import to_device


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The table: start, best rate and held-out loss of every method."""
    names = names_of(options.methods)
    rates = _rates(options.learning_rates)
    with speaking(options):
        records = load_records(options)
        if len(records) < options.held_out + options.batch_size:
            raise DataError(
                f"{len(records)} records are too few to hold {options.held_out} back: give more, or "
                "a smaller --held-out."
            )
        held = batches_of(Subset(records, range(options.held_out)), options.batch_size)
        data = batches_of(
            Subset(records, range(options.held_out, len(records))), options.batch_size
        )
        table = _runs(options, names, rates, data, held)
    best = {name: min(runs, key=lambda r: r["loss"]) for name, runs in table.items()}
    order = sorted(names, key=lambda name: best[name]["loss"])
    lines = [
        f"{'method':<12}{'best rate':>10}{'start loss':>12}{'held-out loss':>15}{'start, s':>10}"
    ]
    for name in order:
        row = best[name]
        lines.append(
            f"{name:<12}{row['rate']:>10.2g}{row['start_loss']:>12.4f}{row['loss']:>15.4f}"
            f"{row['seconds']:>10.1f}"
        )
    edges = [n for n in order if len(rates) > 1 and best[n]["rate"] in (rates[0], rates[-1])]
    if edges:
        lines.append(
            f"at the edge of the rates tried: {', '.join(edges)}. Try further ones before you judge."
        )
    lines.append(
        f"one run each, {options.steps} steps, {options.held_out} held-out records: small differences "
        "are noise."
    )
    return {"best": best, "runs": table}, "\n".join(lines)


def _rates(text: str) -> list[float]:
    try:
        rates = sorted(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        rates = []
    if not rates or rates[0] <= 0:
        raise ValueError(f"--learning-rates {text}: write positive numbers with commas, 1e-4,3e-4.")
    return rates


def _runs(
    options: argparse.Namespace, names: list[str], rates: list[float], data: Any, held: Any
) -> dict[str, list[dict[str, Any]]]:
    model = load_model(options)
    sample = sample_arguments(options)
    needs = frozenset().union(*(class_of(name)().needs for name in names))
    statistics = None
    if needs:
        statistics = collect_statistics(
            model, lora_config(options), data=data, needs=needs, **sample
        )
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    quiet = not sample["progress"]
    bar = tqdm(
        total=len(names) * len(rates), desc="compare", unit="run", disable=True if quiet else None
    )
    # One line a run says little that the table does not.
    logging.getLogger("lorainit").setLevel(logging.WARNING)
    with bar:
        for name, rate in itertools.product(names, rates):
            method = class_of(name)()
            calibrated = bool(getattr(method, "calibrated", False))
            torch.manual_seed(options.seed)
            begin = time.perf_counter()
            wrapped = get_peft_model(
                model, lora_config(options), method=method, statistics=statistics,
                data=data if calibrated else None, **{**sample, "progress": False},
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            start_loss = held_out_loss(wrapped, held)
            _train(wrapped, data, rate, options.steps)
            loss = held_out_loss(wrapped, held)
            table[name].append(
                {"rate": rate, "start_loss": start_loss, "loss": loss, "seconds": seconds}
            )
            model = wrapped.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            bar.update()
    return table


def held_out_loss(model: PeftModel, batches: Any) -> float:
    """Mean loss of a label token."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in batches:
            labels = int((batch["labels"][:, 1:] != -100).sum())
            if labels:
                total += float(model(**to_device(batch, device)).loss) * labels
                count += labels
    loss = total / count if count else math.nan
    return loss if math.isfinite(loss) else math.inf


def _train(model: PeftModel, data: Any, rate: float, steps: int) -> None:
    """AdamW, a short warm-up, then a straight line to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / max(1, steps - warm)))
    )
    device = parameters[0].device
    model.train()
    batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(data)), steps)
    for batch in batches:
        loss = model(**to_device(batch, device)).loss
        if not bool(torch.isfinite(loss)):
            continue
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
