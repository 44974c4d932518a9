"""Tables and the figure of the stage "grid" alone: ``python -m benchmarks.quality.compare_grid``.

Writes ``grid-MODEL.md`` and ``rate-by-method-MODEL.png`` beside the records, as
``python -m benchmarks.quality.analyze`` does with all others.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.quality.analysis.cost import StepTimes, read_step_times
from benchmarks.quality.analysis.grid_report import by_grid_model, grid_report
from benchmarks.quality.analysis.rate_figure import rate_figure
from benchmarks.quality.analysis.rate_grid import cells_of
from benchmarks.quality.analysis.rate_tables import common_tasks
from benchmarks.quality.records import RESULTS, Record, read_records


def write_grids(records: Iterable[Record], out: Path, steps: Path | None = None) -> list[Path]:
    """Tables and figures of every model that has a comparison.

    Args:
        records: of all stages.
        out: folder of the files.
        steps: file of ``benchmarks.quality.step_time``; None: the kept one.
    """
    out.mkdir(parents=True, exist_ok=True)
    timed = read_step_times(*([steps] if steps else []))
    found = []
    for grid in by_grid_model(records):
        path = out / f"grid-{grid.model}.md"
        text = grid_report(grid, StepTimes.of(timed, grid.model))
        path.write_text(text, encoding="utf-8")
        found.append(path)
        common = common_tasks(cells_of(grid.main))
        if any(len(lines) > 1 for lines in common.values()):
            picture = out / f"rate-by-method-{grid.model}.png"
            found.append(rate_figure(common, picture, score=grid.score))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for path in write_grids(read_records(arguments.records).values(), arguments.out):
        print(path)


if __name__ == "__main__":
    main()
