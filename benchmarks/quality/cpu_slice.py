"""A slice of the benchmark for a processor: three methods, three kinds of models, a few minutes.

It shows that the harness runs and what its records and tables look like; it is far too small to rank
methods by.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.analysis.report import report
from benchmarks.quality.bench import Bench
from benchmarks.quality.data.files import default_folder, prepare
from benchmarks.quality.experiment import FULL, Experiment
from benchmarks.quality.models.loading import choose_device, load_model
from benchmarks.quality.models.registry import defaults, model_of
from benchmarks.quality.records import read_records

TASKS = ("simple_equations", "tweets", "rotated")

METHODS = ("vanilla", "lora-one", "lora-da")


def experiments(task: str) -> list[Experiment]:
    """Six steps of four sequences; full fine-tuning where that is small."""
    small = {
        "steps": 6,
        "batch_size": 4,
        "train_samples": 24,
        "statistics_samples": 16,
        "precision": "fp32",
    }
    fields = defaults(task) | small
    methods = METHODS if task == "simple_equations" else (*METHODS, FULL)
    return [Experiment(task, method, 1e-3, **fields) for method in methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "quality-cpu")
    parser.add_argument("--data", type=Path, default=default_folder())
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    arguments = parser.parse_args()
    done = set(read_records([arguments.out]))
    for task in arguments.tasks:
        wanted = [e for e in experiments(task) if e.id not in done]
        if not wanted:
            continue
        prepare(task, arguments.data)
        bench = Bench(
            load_model(None, choose_device("cpu"), model_of([task])),
            arguments.data,
            arguments.out,
            "seeds",
            stack=len(METHODS),
            validation_rows=8,
            test_rows=16,
            evaluation_rows=8,
        )
        bench.run(wanted, done)
    text = report(read_records([arguments.out]).values())
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
