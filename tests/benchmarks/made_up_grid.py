"""Made-up records of the stage "grid": first seeds at nine rates, later ones at six, one cut short."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from benchmarks.quality.experiment import GRID

Record = dict[str, Any]

TASKS = ("basic_arithmetic", "chain_sum", "count_bits", "gcd")
LABELS = ("vanilla", "auto", "pissa")
SIX = GRID[2:8]
BEST = {"vanilla": 1e-3, "auto": 1e-3, "pissa": 5e-5}
GAIN = {"vanilla": 0.0, "auto": 0.05, "pissa": -0.02}
STEPS = (0, 4, 8, 16)


def rates_run(label: str, seed: int) -> tuple[float, ...]:
    """Seed 0 whole; then six; the last seed of Auto was cut short; PiSSA has two seeds."""
    if seed == 0:
        return GRID
    if label == "pissa":
        return GRID if seed == 1 else ()
    return SIX if seed < 4 or label == "vanilla" else SIX[:3]


def made(rank: int = 8, model: str = "smollm2-135m-instruct", seed: int = 0) -> list[Record]:
    """Every run: a parabola over the logarithm of the rate, other by task, line and seed, with noise."""
    rng = np.random.default_rng(seed + rank)
    found = []
    for task in TASKS:
        level = rng.uniform(0.5, 1.5)
        for label in LABELS:
            for run in range(5):
                for rate in rates_run(label, run):
                    away = math.log10(rate / BEST[label])
                    loss = level + 0.5 * away**2 - GAIN[label] + 0.01 * rng.normal()
                    found.append(one(rng, task, label, rate, run, loss, rank, model))
    return found


def one(
    rng: np.random.Generator, task: str, label: str, rate: float, seed: int, loss: float, rank: int, model: str
) -> Record:  # fmt: skip
    items = rng.random(24) < 1 / (1 + loss)
    curve = [loss + 3.0 * math.exp(-step / 4) + 0.01 * rng.normal() for step in STEPS]
    return {
        "id": f"{task}-{label}-{rate}-{seed}-{rank}-{model}",
        "stage": "grid", "task": task, "label": label, "learning_rate": rate, "seed": seed, "rank": rank,
        "experiment": {"model": model}, "train_seconds": 0.5, "stack_evaluate_seconds": 8.0, "stack": 16,
        "init_seconds": {"vanilla": 0.25, "auto": 4.25, "pissa": 1.25}[label],
        "validation": {"loss": loss + 0.002 * rng.normal()},
        "test": {
            "loss": loss, "exact": float(items.mean()), "sequences": 24,
            "loss_error": 0.02 + 0.01 * rng.random(), "items": np.packbits(items).tobytes().hex(),
        },
        "other": {"loss": 3.0 + rng.random() + 0.3 * (label == "auto"), "start_loss": 3.0 + 0.1 * seed},
        "heldout": {"steps": list(STEPS), "loss": curve},
        "heldout_at_percent": {"0": curve[0]},
    }  # fmt: skip
