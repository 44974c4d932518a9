"""Each closed form against the least that dense float64 algebra can reach, on every layer of a real model.

    python -m benchmarks.quantized.optimality --kind nf4 --rank 8 --output optimality.jsonl

SmolLM2-135M, quantized; statistics of some rows of English. Of each layer and of each of four metrics (plain,
diagonal and full on the input side, full on both) one JSON line a layer holds what every method leaves of the
error there, as a share of the error, and the least possible at the rank, by a singular value decomposition in
float64. A method has to be at the least in its own metric, and no other below it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import lorainit
from benchmarks.common.models import load_smollm2, load_smollm2_tokenizer
from benchmarks.quantized.quantizers import QUANTIZERS, quantize
from benchmarks.quantized.recover import METHODS, lora
from benchmarks.quantized.recovery_tables import NAMES
from benchmarks.quantized.token_rows import text_rows
from lorainit.types import LayerStatistics

OWN = {"LoftQ": "plain", "QERA diagonal": "diagonal", "QERA": "inputs", "both sides": "both"}
"""The metric that each method is the least in."""

DAMPING = 0.01
"""Of the methods' defaults, relative to the mean of the diagonal."""


def _root(second: Tensor) -> Tensor:
    """``L`` with ``L L^T = S + damping mean(diag S) I``, float64."""
    second = second.double()
    shift = DAMPING * second.diagonal().mean()
    return torch.linalg.cholesky(second + shift * torch.eye(len(second), dtype=torch.float64))


def metrics(statistics: LayerStatistics) -> dict[str, Any]:
    """By name, how a matrix ``(out, in)`` is seen; the norm of that is what is left."""
    inputs, outputs = statistics.input_second_moment, statistics.output_second_moment
    x, y = _root(inputs), _root(outputs)
    diagonal = inputs.double().diagonal().clamp_min(0).sqrt()
    return {
        "plain": lambda m: m,
        "diagonal": lambda m: m * diagonal,
        "inputs": lambda m: m @ x,
        "both": lambda m: y.mT @ m @ x,
    }


def of_layer(statistics: LayerStatistics, error: Tensor, rank: int) -> dict[str, dict[str, float]]:
    """By metric: each method's remaining share of the error's norm, and the ``least``."""
    known = dataclasses.replace(statistics, weight_error=error)
    left = {}
    for name, method in METHODS.items():
        factors = method.solve(error, known, rank, 1.0)
        left[name] = error.double() - factors.B.double() @ factors.A.double()
    found = {}
    for name, seen in metrics(statistics).items():
        whole = seen(error.double())
        values = torch.linalg.svdvals(whole)
        size = torch.linalg.vector_norm(values)
        found[name] = {
            m: float(torch.linalg.vector_norm(seen(rest)) / size) for m, rest in left.items()
        }
        found[name]["least"] = float(torch.linalg.vector_norm(values[rank:]) / size)
    return found


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    reference: nn.Module = load_smollm2()
    base = copy.deepcopy(reference)
    quantize(base, options.kind, lora(options.rank))
    rows = text_rows(load_smollm2_tokenizer(), options.rows, 128)
    batches = [{"input_ids": part, "labels": part} for part in rows.split(4)]
    needs = lorainit.KroneckerQER().needs
    statistics = lorainit.collect_statistics(base, lora(options.rank), data=batches, needs=needs)
    names = list(statistics)[:: options.every]
    for name in tqdm(names, desc="layers", unit="layer"):
        full, rounded = (m.get_submodule(name).weight.detach() for m in (reference, base))
        found = of_layer(statistics[name], full - rounded, options.rank)
        yield {"layer": name, "kind": options.kind, "rank": options.rank, "left": found}


def table(records: list[dict[str, Any]]) -> str:
    """By method: how far above the least it is in its own metric, and how often another is below it."""
    lines = [
        "| method | layers | largest excess over the least | layers where another method leaves less |",
        "|---|---|---|---|",
    ]
    for method, metric in OWN.items():
        own = [r["left"][metric] for r in records]
        excess = max(v[method] / v["least"] - 1 for v in own)
        # A float32 tie is none.
        beaten = sum(min(v[m] for m in OWN) < v[method] * (1 - 1e-6) for v in own)
        lines.append(f"| {NAMES.get(method, method)} | {len(own)} | {excess:.1e} | {beaten} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", default="nf4", choices=QUANTIZERS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="of 128 tokens")
    parser.add_argument("--every", type=int, default=1, help="of the layers, one in so many")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    records = []
    for record in run(options):
        records.append(record)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(table(records))


if __name__ == "__main__":
    main()
