"""A slice of the benchmark for a processor: three methods, a handful of steps, a few minutes.

It shows that the harness runs and what its records and tables look like; it is far too small to rank
methods by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.analyze import report
from benchmarks.quality.data import default_folder, prepare
from benchmarks.quality.experiment import Experiment
from benchmarks.quality.records import read_records
from benchmarks.quality.run import Bench, choose_device, load_model

TASK = "simple_equations"
METHODS = ("vanilla", "lora-one", "lora-da")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "quality-cpu")
    parser.add_argument("--data", type=Path, default=default_folder())
    arguments = parser.parse_args()
    prepare(TASK, arguments.data)
    experiments = [
        Experiment(
            TASK,
            method,
            1e-3,
            steps=6,
            batch_size=4,
            train_samples=24,
            statistics_samples=16,
            precision="fp32",
        )
        for method in METHODS
    ]
    done = set(read_records([arguments.out]))
    if any(e.id not in done for e in experiments):
        bench = Bench(
            load_model(None, choose_device("cpu")),
            arguments.data,
            arguments.out,
            "seeds",
            stack=len(METHODS),
            validation_rows=8,
            test_rows=16,
            evaluation_rows=8,
        )
        bench.run(experiments, done)
    text = report(read_records([arguments.out]).values())
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
