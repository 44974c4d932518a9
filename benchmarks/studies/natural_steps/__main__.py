"""Which form of repeated natural steps closes most of the loss gap, without any training step.

    python -m benchmarks.quality.data --out DATA          # prompts of the plain style
    python -m benchmarks.studies.natural_steps --data DATA --out natural_steps.jsonl

A run is ``variant:steps:damping:reduction:mask:fisher``. Variants: full steps cut back to rank r in the
Fisher metric (``cut``, with ``shrink`` of singular values; ``late``: the length searched before the cut),
steps in the ``tangent`` space of the rank-r matrices, rank shared among the steps (``share``; a number
after it: the rank of each), and ``lora``: plain LoRA, for which damping is the learning rate, mask
``fit`` or ``train`` the data, and fisher the number of steps between reports. The kept rows were made with
256 other problems of the same tasks and prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.provenance import provenance
from benchmarks.quality.data.files import default_folder, load_pools
from benchmarks.quality.data.order import training_rows
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.models.registry import KINDS
from benchmarks.studies.natural_steps.displacement import evaluate
from benchmarks.studies.natural_steps.steps import run
from benchmarks.studies.natural_steps.training import train_lora

MODEL = "smollm2-135m-instruct"
TASKS = "chain_sum,letter_counting,gsm_symbolic,family_relationships,simple_equations"
SHOWN = ("k", "loss", "match", "seconds", "held", "fit")


def rows_of(
    spec: str, pools: dict[str, Pool], seed: int, model: nn.Module, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The base and every reported step of one run."""
    variant, steps, damping, reduction, mask, fisher = spec.split(":")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    train = pools["train"]
    rows = training_rows(len(train), arguments.sequences, seed).tolist()
    held = train.batches(rows[4::5], arguments.batch)
    fit_rows = [row for index, row in enumerate(rows) if index % 5 != 4]
    test = pools["test"].first(arguments.test)
    test_batches = test.batches(range(len(test)), 256)
    loss, match = evaluate(model, test_batches)
    found = [{"k": 0, "loss": loss, "match": match}]
    dampings = [float(value) for value in damping.split("/")]
    if variant == "lora":
        if mask == "train":
            rows = training_rows(len(train), 4096, seed).tolist()
        found += train_lora(
            model,
            modules,
            train.batches(rows, 32),
            held,
            test_batches,
            rank=arguments.rank,
            steps=int(steps),
            lr=dampings[0],
            report=int(fisher),
        )
        return found
    found += run(
        model,
        modules,
        train.batches(fit_rows, arguments.batch),
        held,
        test_batches,
        rank=arguments.rank,
        steps=int(steps),
        variant=variant,
        dampings=dampings,
        reduction=reduction,
        mask=mask,
        fisher=fisher,
        report={1, 2, 4, 8, int(steps)},
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=default_folder(), help="prepared tasks")
    parser.add_argument("--model", type=Path, help="folder of a packed model; else the cache's")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--runs", default="cut:4:0.01:token:attention:empirical")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--test", type=int, default=1024)
    parser.add_argument("--time-limit", type=float, default=1e9)
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = torch.device(arguments.device)
    model = KINDS[MODEL].load(arguments.model, device).requires_grad_(False)

    def say(record: dict[str, Any]) -> None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    say(provenance(device))
    for spec, task, seed in itertools.product(
        arguments.runs.split(","), arguments.tasks.split(","), arguments.seeds.split(",")
    ):
        if time.perf_counter() - began > arguments.time_limit:
            return
        pools = load_pools(task, arguments.data, MODEL)
        pools = {name: p.to(device) for name, p in pools.items()}
        names = ("variant", "steps", "damping", "reduction", "mask", "fisher")
        common = dict(zip(names, spec.split(":"), strict=True)) | {"task": task, "seed": int(seed)}
        common |= {"steps": int(common["steps"]), "rank": arguments.rank}
        for row in rows_of(spec, pools, int(seed), model, arguments):
            say({**common, **row})
            shown = " ".join(f"{key}={row[key]:.3f}" for key in SHOWN if key in row)
            print(spec, task, shown, flush=True)


if __name__ == "__main__":
    main()
