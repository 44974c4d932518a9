"""`make methods-report`: every method against every check, with the measured errors.

The checks are those of the test suite (`tests/methods`); "kinds" are the optima on a convolution and an
embedding, from statistics that the package collects. Prints two tables and writes
``results/methods_report.json`` beside this file; ends with status 1 where a check fails. With
``--speed`` also the time to solve all 210 target layers of SmolLM2-135M, statistics given.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import warnings
from pathlib import Path

import torch
from tests.methods import contract, kinds, optima, references
from tests.methods.common import Check

from benchmarks.common.cache import REPOSITORY
from benchmarks.methods_report.speed import speed
from lorainit.methods import METHODS

RESULTS = Path(__file__).resolve().parent / "results" / "methods_report.json"

GROUPS = (
    ("contract", contract.CHECKS),
    ("optimum", optima.CHECKS),
    ("reference", references.CHECKS),
    ("kinds", kinds.all_checks()),
)


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
    print(f"written to {RESULTS.relative_to(REPOSITORY)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
