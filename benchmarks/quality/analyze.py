"""From records to tables and figures: ``python -m benchmarks.quality.analyze [--records ...]``.

Of the stage "grid" ``grid-MODEL.md`` and its figure, see `compare_grid`; of the first edition's stages
``tables.md`` and its figures. In those the learning rate of every method and task is chosen on the validation
split (mean over seeds), and all else is read at that rate. Intervals are percentile bootstraps over seeds; a
comparison with plain LoRA pairs the runs of one task and seed: same data, same order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.cache import REPOSITORY
from benchmarks.quality.analysis.budget_figures import sweeps
from benchmarks.quality.analysis.figures import differences, figures
from benchmarks.quality.analysis.lines import collect_lines
from benchmarks.quality.analysis.report import chosen_on, in_order, model_name, report
from benchmarks.quality.analysis.speed_figures import speed_and_forgetting
from benchmarks.quality.analysis.sweeps import sweeps_of
from benchmarks.quality.compare_grid import write_grids
from benchmarks.quality.models.registry import FRESH_TASKS
from benchmarks.quality.records import FIRST_EDITION, RESULTS, read_records

PICTURE = REPOSITORY / "docs" / "images" / "quality.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=Path, help="seconds of steps; default: the kept ones")
    parser.add_argument("--picture", type=Path, help="of the final scores; default: the docs'")
    arguments = parser.parse_args()
    here = arguments.out.resolve() == RESULTS.resolve()
    picture = arguments.picture or (PICTURE if here else arguments.out / PICTURE.name)
    known = read_records(arguments.records).values()
    for path in write_grids(known, arguments.out, arguments.steps):
        print(path)
    records = in_order(r for r in known if r["stage"] in FIRST_EDITION)
    if not records:
        return
    text = report(records)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)

    final = [r for r in records if r["stage"] == "seeds"]
    print(differences({m: collect_lines(v) for m, v in chosen_on(final).items()}, picture))
    for model in sorted({model_name(r) for r in records if r["task"] not in FRESH_TASKS}):
        mine = [r for r in records if model_name(r) == model]
        final = [r for r in mine if r["stage"] == "seeds"]
        search = [r for r in mine if r["stage"] == "search"]
        lines = collect_lines(final)
        for path in figures(lines, search, arguments.out, model):
            print(path)
        if swept := sweeps_of(mine):
            print(sweeps(swept, arguments.out / f"budgets-{model}.png"))
        print(speed_and_forgetting(lines, final, arguments.out / f"speed-{model}.png"))


if __name__ == "__main__":
    main()
