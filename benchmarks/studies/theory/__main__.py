"""What the methods' objectives say, checked on models where the truth is known.

    python -m benchmarks.studies.theory      # a few minutes, writes ../results/theory.json
    python -m benchmarks.studies.theory --quick

The constructions stand here, the assertions in ``tests/theory``, the reading in ``docs/theory.md``.
All arithmetic is float64 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers

from benchmarks.studies import RESULTS
from benchmarks.studies.theory.kl_curvature import (
    gram_candidates,
    svd_candidates,
    transformer_correlations,
)
from benchmarks.studies.theory.linear_results import LARGE, SMALL, run_linear, run_natural
from benchmarks.studies.theory.tiny_llama import tiny_llama


def provenance() -> dict[str, object]:
    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "command": "python -m benchmarks.studies.theory",
        "commit": git("rev-parse", "HEAD"),
        "changed_files": sorted(
            line[3:]
            for line in git("status", "--porcelain", "src", "benchmarks").splitlines()
            if line.endswith(".py")
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float64, CPU",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_transformer(seeds: int, draws: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for seed in range(seeds):
        model, tokens, loss = tiny_llama(seed)
        entry: dict[str, object] = {"seed": seed, "loss": loss}
        for name, candidates in (("gram", gram_candidates), ("svd", svd_candidates)):
            layers = transformer_correlations(model, tokens, candidates, draws=draws)
            energy = torch.tensor([row["energy"] for row in layers.values()])
            entry[name] = {
                "mean": {
                    score: sum(row[score] for row in layers.values()) / len(layers)
                    for score in next(iter(layers.values()))
                },
                "least": float(energy.min()),
                "median": float(energy.median()),
                "layers": layers,
            }
            print(f"transformer seed={seed} {name}", entry[name]["mean"], float(energy.min()))
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start, origin = time.perf_counter(), provenance()
    results: dict[str, object] = {
        "linear_small": run_linear(6, 12, 3, (40, 640) if quick else SMALL, 3000),
        "natural": run_natural(),
        "transformer": run_transformer(1 if quick else 3, 4 if quick else 64),
    }
    if not quick:
        results["linear_large"] = run_linear(24, 48, 6, LARGE, 1000)
        results["provenance"] = {**origin, "seconds": round(time.perf_counter() - start, 1)}
        (RESULTS / "theory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
