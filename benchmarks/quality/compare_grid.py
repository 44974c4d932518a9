"""Tables and the figure of the stage "grid": ``python -m benchmarks.quality.compare_grid``.

Writes ``grid-MODEL.md`` and ``rate-by-method-MODEL.png`` beside the records.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.analysis.rate_figure import rate_figure
from benchmarks.quality.analysis.rate_grid import (
    cells_of,
    common_tasks,
    comparison,
    rate_table,
    task_table,
)
from benchmarks.quality.choose import chosen, rooms, table
from benchmarks.quality.records import RESULTS, read_records
from benchmarks.quality.stages import STANDARD_RANK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--most", type=int, default=12, help="tasks that are compared on")
    arguments = parser.parse_args()
    records = [
        r
        for r in read_records(arguments.records).values()
        if r["stage"] == "grid" and r["rank"] == STANDARD_RANK
    ]
    # Quantized bases have a table of their own (benchmarks.published).
    models = {r["experiment"]["model"] for r in records}
    for model in sorted(model for model in models if "+" not in model):
        mine = [r for r in records if r["experiment"]["model"] == model]
        found = rooms(mine)
        names = chosen(found, arguments.most)
        cells = cells_of(r for r in mine if r["task"] in names)
        common = common_tasks(cells)
        seconds = sum(r["train_seconds"] + r["stack_evaluate_seconds"] / r["stack"] for r in mine)
        parts = [
            f"# Every line at every rate: {model}",
            f"{len(mine)} runs, {seconds / 60:.0f} accelerator minutes of training and evaluation.",
            "## The tasks, chosen by plain LoRA alone",
            table(found, names),
            "## Against plain LoRA, each at its own best rate",
            comparison(cells),
            f"## At fixed rates: test loss above tuned plain LoRA's, mean over {len(common)} tasks",
            "Tasks on which every line has run: " + ", ".join(sorted(common)) + ".",
            rate_table(common),
            "## At fixed rates: exact match, %",
            rate_table(common, "exact"),
            "## Test loss at the best rate, by task",
            task_table(cells),
        ]
        text = "\n\n".join(parts) + "\n"
        (arguments.out / f"grid-{model}.md").write_text(text, encoding="utf-8")
        print(text)
        print(rate_figure(common, arguments.out / f"rate-by-method-{model}.png"))


if __name__ == "__main__":
    main()
