"""Tables of the suggested learning rates: ``python -m benchmarks.quality.suggested``.

Reads the records of the stage "grid" and of ``suggestions``; writes ``suggested-rates.md`` beside them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.analysis.steps_of_runs import steps_of_runs
from benchmarks.quality.analysis.suggested_rates import by_line, by_model, cases, fit, table
from benchmarks.quality.records import RESULTS, read_records
from lorainit.calibration.learning_rate import suggested


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--suggestions", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    grid = [r for r in read_records(options.records).values() if r["stage"] == "grid"]
    members = cases(grid, read_records(options.suggestions, "suggestions").values())
    parts = [
        "# The suggested learning rate against the whole grid",
        "The law was fitted on SmolLM2's records alone. Models with a head that is trained beside the "
        "adapter are told no rate.",
        "## Regret by model, %: median / nine in ten below",
        by_model(members, suggested),
        "## The same, by the held-out loss of the runs themselves after so many steps",
        steps_of_runs(grid, suggested),
    ]
    for model in sorted({m.model for m in members}):
        mine = [m for m in members if m.model == model]
        c, p = fit(mine)
        parts += [
            f"## {model}",
            f"{len(mine)} lines on {len({m.key[0] for m in mine})} tasks. Refitted on these, the law would be "
            f"{c:.2g} (two steps / 5e-4)^{p:.2g}.",
            table(mine, suggested),
            by_line(mine, suggested),
        ]
    text = "\n\n".join(parts)
    (options.out / "suggested-rates.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
