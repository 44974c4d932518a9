"""``lorainit compare``: short training runs from several starts, each at its own best rate."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

from lorainit.calibration.learning_rate import LearningRate
from lorainit.cli.choices import class_of, needs_of
from lorainit.cli.loading import load_model
from lorainit.cli.plan import plan
from lorainit.cli.shared import (
    load_records,
    lora_config,
    mean_loss,
    sample_arguments,
    speaking,
)
from lorainit.data import batches_of
from lorainit.data.nested import to_device
from lorainit.errors import DataError
from lorainit.files.atomic import write_text
from lorainit.pipeline import collect_statistics, get_peft_model, suggest_learning_rate
from lorainit.pipeline.rate import SEQUENCES

_POINTS = 4
"""How often the held-out loss is measured in a run, after its start."""

_MORE_RATES = 2
"""How many rates are tried beyond those given, while the best of a method is the outermost."""


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The table: start, best rate and held-out loss of every method, and the same at the suggested rate."""
    names = list(options.methods)
    rates = sorted({float(rate) for rate in options.learning_rates})
    needs = needs_of(names)
    with speaking(options):
        if options.dry_run:
            # The suggested rate is tried too.
            runs = len(names) * (len(rates) + 1)
            trained = runs * options.steps * options.batch_size
            return plan(options, needs, trained=trained, rates=len(names))
        records = load_records(options)
        if len(records) < options.held_out + options.batch_size:
            raise DataError(
                f"{len(records)} records are too few to hold {options.held_out} back: give more, or "
                "a smaller --held-out."
            )
        held = batches_of(Subset(records, range(options.held_out)), options.batch_size)
        rest = Subset(records, range(options.held_out, len(records)))
        result = _runs(options, names, rates, batches_of(rest, options.batch_size), held)
    if options.output:
        write_text(Path(options.output), json.dumps(result, indent=1) + "\n")
    return result, _table(options, result)


def _runs(
    options: argparse.Namespace,
    names: list[str],
    rates: list[float],
    data: Any,
    held: Any,
) -> dict[str, Any]:
    model = load_model(options)
    sample = sample_arguments(options)
    base_loss = mean_loss(model, held)
    methods = {name: class_of(name)() for name in names}
    # What measures a length holds sequences back, as 'lorainit init' does: its statistics are its own.
    alone = {name for name, m in methods.items() if getattr(m, "calibrated", False)}
    needs = frozenset().union(*(m.needs for name, m in methods.items() if name not in alone))
    statistics = None
    if needs:
        statistics = collect_statistics(
            model, lora_config(options), data=data, needs=needs, **sample
        )
    table: dict[str, list[dict[str, Any]]] = {}
    suggested: dict[str, float] = {}
    ranges: dict[str, list[float]] = {}
    hidden = None if sample["progress"] else True
    bar = tqdm(
        total=len(names) * len(rates) * options.steps, desc="compare", unit="step", disable=hidden
    )
    # One line a start says little that the table does not.
    logging.getLogger("lorainit").setLevel(logging.WARNING)
    with bar:
        for name in names:
            torch.manual_seed(options.seed)
            begin = time.perf_counter()
            wrapped = get_peft_model(
                model, lora_config(options), method=methods[name],
                statistics=None if name in alone else statistics,
                data=data if name in alone else None, **{**sample, "progress": False},
            )  # fmt: skip
            seconds = time.perf_counter() - begin
            found = _suggestion(wrapped, data, sample)
            rate = None
            if found is not None:
                rate, ranges[name] = float(f"{found.value:.3g}"), [found.low, found.high]
                suggested[name] = rate
            table[name] = _tuned(options, name, rates, rate, wrapped, data, held, bar)
            for trial in table[name]:
                trial["seconds"] = seconds
            model = wrapped.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
    best = {name: min(trials, key=lambda t: t["loss"]) for name, trials in table.items()}
    return {
        "base_loss": base_loss,
        "steps": options.steps,
        "held_out": options.held_out,
        "best": best,
        "suggested": suggested,
        "suggested_range": ranges,
        "runs": table,
    }


def _suggestion(model: PeftModel, data: Any, sample: dict[str, Any]) -> LearningRate | None:
    """The rate that is suggested for a start; None where none can be."""
    try:
        return suggest_learning_rate(
            model, data, **{**sample, "max_sequences": SEQUENCES, "progress": False}
        )
    except DataError:
        return None


def _tuned(
    options: argparse.Namespace,
    name: str,
    rates: list[float],
    suggested: float | None,
    model: PeftModel,
    data: Any,
    held: Any,
    bar: Any,
) -> list[dict[str, Any]]:
    """One method at every rate, at some beyond while the best is the outermost, and at the suggested one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trainable]
    start_loss = mean_loss(model, held)
    trials: list[dict[str, Any]] = []

    def attempt(rate: float) -> None:
        bar.set_postfix_str(f"{name} at {rate:.2g}")
        with torch.no_grad():
            for parameter, value in zip(trainable, start, strict=True):
                parameter.copy_(value)
        torch.manual_seed(options.seed)
        losses, curve = _train(model, trainable, data, held, rate, options.steps, bar)
        trials.append(
            {
                "rate": rate,
                "start_loss": start_loss,
                "loss": curve[-1][1],
                "curve": [[0, start_loss], *curve],
                "train_losses": losses,
            }
        )
        trials.sort(key=lambda t: t["rate"])

    for rate in rates:
        attempt(rate)
    if suggested is not None and suggested not in rates:
        bar.total += options.steps
        attempt(suggested)
    for _ in range(_MORE_RATES if len(rates) > 1 else 0):
        side = _outermost(trials)
        if side is None:
            break
        bar.total += options.steps
        factor = rates[1] / rates[0]
        attempt(float(f"{trials[side]['rate'] * (factor if side else 1 / factor):.2g}"))
    return trials


def _outermost(trials: Sequence[dict[str, Any]]) -> int | None:
    """Where the best of several rates is the lowest (0) or the highest (-1) that was tried."""
    losses = [trial["loss"] for trial in trials]
    if len(losses) < 2 or not math.isfinite(min(losses)):
        return None
    return {0: 0, len(losses) - 1: -1}.get(losses.index(min(losses)))


def _train(
    model: PeftModel,
    trainable: Sequence[Tensor],
    data: Any,
    held: Any,
    rate: float,
    steps: int,
    bar: Any,
) -> tuple[list[float], list[list[float]]]:
    """AdamW, a short warm-up, then a straight line to zero; losses, and held-out losses by step."""
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / max(1, steps - warm)))
    )
    device = trainable[0].device
    points = {max(1, round(steps * i / _POINTS)) for i in range(1, _POINTS + 1)}
    losses, curve = [], []
    batches = itertools.islice(itertools.chain.from_iterable(itertools.repeat(data)), steps)
    for number, batch in enumerate(batches, 1):
        model.train()
        loss = model(**to_device(batch, device)).loss
        losses.append(float(loss))
        if math.isfinite(losses[-1]):
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
        if number in points:
            curve.append([number, mean_loss(model, held)])
        bar.update()
    return losses, curve


def _table(options: argparse.Namespace, result: dict[str, Any]) -> str:
    best, runs = result["best"], result["runs"]
    order = sorted(best, key=lambda name: best[name]["loss"])
    steps = [int(step) for step, _ in best[order[0]]["curve"]]
    head = f"{'method':<12}{'best rate':>10}" + "".join(f"{f'step {s}':>10}" for s in steps)
    lines = [
        f"held-out loss of {options.held_out} records; the base model's is "
        f"{result['base_loss']:.4f}",
        head + f"{'start, s':>10}{'suggested':>11}{'at its end':>12}",
    ]
    for name in order:
        row = best[name]
        losses = "".join(f"{loss:>10.4f}" for _, loss in row["curve"])
        rate = result["suggested"].get(name)
        at = [trial["loss"] for trial in runs[name] if trial["rate"] == rate]
        shown = f"{rate:>11.2g}{at[0]:>12.4f}" if at else f"{'none':>11}"
        lines.append(f"{name:<12}{row['rate']:>10.2g}{losses}{row['seconds']:>10.1f}{shown}")
    lines.append("by learning rate, the suggested one with a star and its range:")
    for name in order:
        rate = result["suggested"].get(name)
        tried = "  ".join(
            f"{trial['rate']:.2g}{'*' if trial['rate'] == rate else ''} {trial['loss']:.4f}"
            for trial in runs[name]
        )
        ends = result["suggested_range"].get(name)
        lines.append(f"{name:<12}{tried}" + (f"  ({ends[0]:.1g} to {ends[1]:.1g})" if ends else ""))
    edges = [name for name in order if _outermost(runs[name]) is not None]
    if edges:
        lines.append(
            f"best at the outermost rate tried: {', '.join(edges)}. Try further ones before you judge."
        )
    lines.append(f"one run each of {options.steps} steps: small differences are noise.")
    if options.output:
        lines.append(f"curves of all runs: {options.output}")
    return "\n".join(lines)
