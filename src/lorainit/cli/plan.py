"""``--dry-run``: layers, memory, passes and a rough time, before anything long is done."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from lorainit.adapters.targets import Targets, match_targets
from lorainit.cli.loading import load_skeleton
from lorainit.cli.shared import load_records, lora_config, size_in_words
from lorainit.data import Records
from lorainit.pipeline.rate import SEQUENCES
from lorainit.types import GRADIENT_STATISTICS, LayerSpec

_RATE_STEPS, _RATE_FORWARDS = 6, 8
"""Gradients of a quarter of its sequences that a suggested learning rate takes, and forward passes over half of
them, about."""

_SEARCH_FORWARDS = 20
"""Forward passes over the held-back sequences that the measurement of one step takes, about."""


def plan(
    options: argparse.Namespace,
    needs: frozenset[str],
    *,
    steps: int = 1,
    searched: bool = False,
    trained: float | None = None,
    rates: int = 0,
) -> tuple[dict[str, Any], str]:
    """What the command would do; the model's weights are not loaded.

    Args:
        options: of the command.
        needs: statistics to collect.
        steps: how often they are collected.
        searched: whether a length is measured by forward passes.
        trained: sequences that training takes, counted again whenever they are; None: no training.
        rates: how many learning rates are suggested.
    """
    model = load_skeleton(options)
    targets = match_targets(model, lora_config(options))
    records = load_records(options) if options.data else None
    sequences = min(options.max_sequences, len(records)) if records else 0
    tokens = _tokens(records, sequences)
    collected = needs if records and not getattr(options, "statistics", None) else frozenset()
    parameters = sum(p.numel() for p in model.parameters())
    work = _work(targets, parameters, tokens, collected, steps, searched and records is not None)
    rated = tokens * min(1.0, SEQUENCES / max(1, sequences))
    work += rates * rated * parameters * (6.0 * _RATE_STEPS / 4 + 2.0 * _RATE_FORWARDS / 2)
    if trained is not None:
        # Forward and backward, the weights' own gradients left out.
        work += 4.0 * parameters * trained * tokens / max(1, sequences)
    found: dict[str, Any] = {
        "layers": len(targets.layers),
        "left_out": targets.left_out,
        "model_parameters": parameters,
        "adapter_parameters": sum(
            t.spec.rank * (t.spec.in_features + t.spec.out_features)
            for t in targets.layers.values()
        ),
        "sequences": sequences,
        "tokens": tokens,
        "passes": steps if collected else 0,
        "backward": bool(collected & GRADIENT_STATISTICS),
        "trained_sequences": trained,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "statistics_bytes_at_most": sum(_bytes(t.spec, collected) for t in targets.layers.values()),
        "seconds_about": work / _speed(options),
    }
    return found, _in_words(found, collected)


def _tokens(records: Records | None, sequences: int) -> int:
    """Tokens of the sample, from a few of its sequences."""
    if records is None or sequences == 0:
        return 0
    few = min(sequences, 32)
    return round(sum(len(records[i].input_ids) for i in range(few)) / few * sequences)


def _bytes(spec: LayerSpec, needs: frozenset[str]) -> int:
    """Of one layer's sums, in float32; layers that read one tensor share theirs of the inputs."""
    rows, columns = spec.out_features, spec.in_features
    sizes = {
        "gradient": rows * columns,
        "input_second_moment": columns if spec.one_hot else columns * columns,
        "input_mean": columns,
        "output_second_moment": rows * rows,
        "output_second_moment_diagonal": 0 if "output_second_moment" in needs else rows,
    }
    return 4 * sum(sizes[name] for name in needs)


def _work(
    targets: Targets,
    parameters: int,
    tokens: int,
    needs: frozenset[str],
    steps: int,
    searched: bool,
) -> float:
    """Floating-point operations, about."""
    specs = [t.spec for t in targets.layers.values()]
    a_token = 2.0 * parameters * (2 if needs & GRADIENT_STATISTICS else 1)
    for spec in specs:
        a_token += 2.0 * _bytes(spec, needs) / 4
    total = tokens * a_token * steps if needs else 0.0
    if searched:
        total += steps * _SEARCH_FORWARDS * 0.2 * tokens * 2.0 * parameters
    solving = sum(10.0 * min(s.out_features, s.in_features) ** 2 * s.in_features for s in specs)
    return total + steps * solving


def _speed(options: argparse.Namespace) -> float:
    """Operations a second in products of matrices here; layers reach about half of it."""
    use_cuda = torch.cuda.is_available() and options.device in ("auto", "cuda")
    matrix = torch.ones(512, 512, device="cuda" if use_cuda else "cpu")
    (matrix @ matrix).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    matrix.sum().item()
    return 4 * 2 * 512**3 / max(time.perf_counter() - start, 1e-6) / 2


def _in_words(found: dict[str, Any], needs: frozenset[str]) -> str:
    lines = [
        f"layers       {found['layers']} to start"
        + (f", {len(found['left_out'])} left at PEFT's start" if found["left_out"] else ""),
        f"adapter      {found['adapter_parameters']:,} parameters beside the model's "
        f"{found['model_parameters']:,}",
        f"memory       {size_in_words(found['model_bytes'])} for the model",
    ]
    lines += [f"left out     {name}: {why}" for name, why in found["left_out"].items()]
    if needs:
        kind = "forward and backward" if found["backward"] else "forward only"
        lines += [
            f"statistics   {', '.join(sorted(needs))}",
            f"             at most {size_in_words(found['statistics_bytes_at_most'])} for them "
            "(layers that read one tensor share it)",
            f"passes       {found['passes']}, {kind}, over {found['sequences']} sequences, about "
            f"{found['tokens']:,} tokens",
        ]
    else:
        lines.append("passes       none for statistics")
    if found["trained_sequences"] is not None:
        lines.append(f"training     {found['trained_sequences']:,.0f} sequences, repeats counted")
    lines.append(f"time         about {_duration(found['seconds_about'])}, roughly")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
