"""`make methods-report`: every method against every check, with the measured errors.

The checks are those of the test suite (`tests/methods`). Prints two tables and writes
``benchmarks/results/methods_report.json``; ends with status 1 where a check fails. With ``--speed``
also the time to solve all 210 target layers of SmolLM2-135M, statistics given.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
from tests.methods import contract, optima, references
from tests.methods.common import Check

from lorainit.methods import METHODS
from lorainit.types import LayerStatistics

RESULTS = Path(__file__).parent / "results" / "methods_report.json"
GROUPS = (
    ("contract", contract.CHECKS),
    ("optimum", optima.CHECKS),
    ("reference", references.CHECKS),
)

SHAPES = {
    "q, o": (60, 576, 576),
    "k, v": (60, 192, 576),
    "gate, up": (60, 1536, 576),
    "down": (30, 576, 1536),
}
"""Layers, out and in of SmolLM2-135M's target layers: 210 in all."""


def measure(group: str, check: Check) -> dict[str, object]:
    """One row: what was measured, the bound, and whether it holds."""
    value = check.measure()
    return {
        "group": group,
        "method": check.method,
        "check": check.name,
        "measured": value,
        "bound": check.bound,
        "must": "exceed" if check.control else "not exceed",
        "passes": check.passes(value),
    }


def print_summary(rows: list[dict[str, object]]) -> None:
    """Method by group: checks passed, and the largest error beside what it may be."""
    print(f"\n{'method':12s}" + "".join(f"{name:>34s}" for name, _ in GROUPS))
    for method in METHODS:
        cells = ""
        for group, _ in GROUPS:
            mine = [r for r in rows if r["method"] == method and r["group"] == group]
            errors = [r["measured"] for r in mine if r["must"] == "not exceed"]
            passed = sum(bool(r["passes"]) for r in mine)
            worst = f"worst error {max(errors):.1e}" if errors else ""  # type: ignore[type-var]
            cells += f"{passed:>4d}/{len(mine)} pass  {worst:>21s}" if mine else f"{'-':>34s}"
        print(f"{method:12s}{cells}")


def speed_case(layers: int, out: int, inner: int) -> tuple[torch.Tensor, LayerStatistics]:
    """A stack of random weights with second moments whose spectra fall as one over the index."""
    rng = torch.Generator().manual_seed(0)

    def moment(n: int) -> torch.Tensor:
        x = torch.randn(layers, 2 * n, n, generator=rng) * torch.arange(1, n + 1) ** -0.5
        q = torch.linalg.qr(torch.randn(n, n, generator=rng)).Q
        return q @ (x.mT @ x / (2 * n)) @ q.mT

    second_in, second_out = moment(inner), moment(out) * 1e-6
    noise = torch.randn(layers, out, inner, generator=rng)
    return torch.randn(layers, out, inner, generator=rng) / inner**0.5, (
        LayerStatistics.from_means(
            gradient=second_out @ noise @ second_in * 1e3,
            input_second_moment=second_in,
            input_mean=second_in[:, 0] * 0.1,
            output_second_moment=second_out,
            population=256.0,
        )
    )


def speed(layers: int) -> list[dict[str, object]]:
    """Seconds for 210 layers at rank 8 in float32, from stacks of `layers`, scaled up by shape."""
    cases = [(count, *speed_case(layers, out, inner)) for count, out, inner in SHAPES.values()]
    rows: list[dict[str, object]] = []
    print(f"\n{'method':12s}{'seconds for 210 layers':>24s}  ({torch.get_num_threads()} threads)")
    for method, kind in METHODS.items():
        wall, busy = 0.0, 0.0
        for count, weight, statistics in cases:
            start = time.perf_counter(), time.process_time()
            kind().solve(weight, statistics, 8, 2.0)
            wall += (time.perf_counter() - start[0]) * count / layers
            busy += (time.process_time() - start[1]) * count / layers
        rows.append({"method": method, "wall_s": wall, "cpu_s": busy, "layers_timed": layers})
        print(f"{method:12s}{wall:>24.1f}", flush=True)
    return rows


def main() -> int:
    """Run every check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true", help="time all 210 layers of SmolLM2-135M")
    parser.add_argument("--layers", type=int, default=4, help="layers of each shape to time")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for group, checks in GROUPS:
        for check in checks:
            row = measure(group, check)
            rows.append(row)
            sign = ">" if check.control else "<="
            verdict = "pass" if row["passes"] else "FAIL"
            print(
                f"{group:10s} {check.method:11s} {check.name:38s} "
                f"{row['measured']:9.2e} {sign:>2s} {check.bound:7.0e}  {verdict}",
                flush=True,
            )
    print_summary(rows)
    timed = speed(arguments.layers) if arguments.speed else []
    failed = [row for row in rows if not row["passes"]]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} checks pass")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    environment = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"environment": environment, "checks": rows, "speed": timed}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to benchmarks/results/{RESULTS.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
