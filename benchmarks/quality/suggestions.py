"""The suggested learning rate of every line, beside which `suggested_rates.py` sets the rates of the grid.

    python -m benchmarks.quality.suggestions --data DATA --model PACKED --out OUT --methods vanilla pissa \
        --tasks gcd --set rank=8 style=chat

For each task, line, rank and seed a start is made as the stages make it, and a rate is suggested for it on the
first training sequences. One JSON line each in ``OUT/suggestions.jsonl``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import lorainit
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.measured_starts import Batches, add_lines, measure_lines, started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_lines(parser)
    measure_lines(parser.parse_args(), "suggestions", suggested, 2.0)


def suggested(model: Any, line: Experiment, batches: Batches) -> dict[str, Any]:
    """What is suggested for one start, and the seconds that it takes."""
    with started(model, line, batches) as wrapped:
        began = time.perf_counter()
        try:
            found = lorainit.suggest_learning_rate(wrapped, batches, progress=False)
        except lorainit.errors.LorainitError as error:
            return {"refused": str(error)}
        return {"suggestion": asdict(found), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
