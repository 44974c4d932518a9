"""Final scores, their comparison with plain LoRA, and loss curves."""

from __future__ import annotations

import math

from benchmarks.quality.analysis.intervals import (
    FEWEST_SEEDS,
    bootstrap,
    mean,
    median,
    sign_flip,
    stratified,
)
from benchmarks.quality.analysis.lines import Line, axes_of, compare, paired
from benchmarks.quality.analysis.markdown import number, table
from benchmarks.quality.experiment import CURVE_PERCENT
from benchmarks.quality.stages import BASELINE


def final_table(lines: dict[tuple[str, str], Line]) -> str:
    tasks, labels = axes_of(lines)
    rows = []
    for label in labels:
        row = [label]
        for task in tasks:
            line, base = lines.get((task, label)), lines.get((task, BASELINE))
            if line is None:
                row.append("–")
                continue
            low, high = bootstrap(line.exact)
            mark = ""
            if base is not None and label != BASELINE:
                _, below, above, _ = compare(line, base)
                mark = " ▲" if below > 0 else " ▼" if above < 0 else ""
            text = f"{100 * mean(line.exact):.1f} [{100 * low:.1f}, {100 * high:.1f}]{mark}"
            few = f"{100 * mean(line.exact):.1f} ({len(line.exact)})"
            row.append(few if math.isnan(low) else text)
        rows.append(row)
    note = (
        "\n\n▲ / ▼: the 95% interval of the paired difference to plain LoRA excludes zero. In round "
        f"brackets, the number of seeds where it is below {FEWEST_SEEDS}: no interval then."
    )
    return table(["method", *tasks], rows) + note


def comparison_table(lines: dict[tuple[str, str], Line]) -> str:
    """Means over tasks: what a reader compares first."""
    tasks, labels = axes_of(lines)
    rows = []
    for label in labels:
        mine = [lines[t, label] for t in tasks if (t, label) in lines]
        groups = [
            paired(line, lines[line.task, BASELINE])
            for line in mine
            if (line.task, BASELINE) in lines
        ]
        differences = [d for group in groups for d in group]
        low, high = stratified(groups)
        shares = [
            to / line.heldout[i][0][-1] for line in mine for i, to in enumerate(line.steps_to)
        ]
        reached = [s for s in shares if math.isfinite(s)]
        rows.append(
            [
                label,
                str(len(mine)),
                f"{100 * mean([mean(line.exact) for line in mine]):.2f}",
                "–"
                if label == BASELINE
                else f"{100 * mean(differences):+.2f}"
                + ("" if math.isnan(low) else f" [{100 * low:+.2f}, {100 * high:+.2f}]"),
                "–" if label == BASELINE else f"{sign_flip(differences):.3f}",
                number(mean([mean([c[1][0] for c in line.heldout]) for line in mine])),
                number(mean([mean(line.early) for line in mine])),
                number(mean([mean(line.area) for line in mine])),
                f"{100 * median(shares):.0f}% ({len(reached)}/{len(shares)})"
                if math.isfinite(median(shares))
                else f"never ({len(reached)}/{len(shares)})",
                number(median([s for line in mine for s in line.seconds_to]), 2),
                number(mean([mean(line.init_seconds) for line in mine]), 2),
            ]
        )
    header = [
        "method", "tasks", "exact match, %", "paired difference to LoRA, points", "p",
        "loss at the start", "early loss above LoRA's final", "mean loss over the run",
        "steps to LoRA's final loss (runs that reach it)", "seconds to it, start included",
        "start, s",
    ]  # fmt: skip
    return table(header, rows)


def curve_table(lines: dict[tuple[str, str], Line]) -> str:
    tasks, labels = axes_of(lines)
    rows = []
    for label in labels:
        mine = [lines[t, label] for t in tasks if (t, label) in lines]
        columns = [
            mean([mean([at[i] for at in line.percent]) for line in mine])
            for i in range(len(CURVE_PERCENT))
        ]
        rows.append([label, *(number(c) for c in columns)])
    return table(["method", *(f"{p}%" for p in CURVE_PERCENT)], rows)
