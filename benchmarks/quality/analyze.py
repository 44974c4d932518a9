"""From records to tables and figures: ``python -m benchmarks.quality.analyze [--records ...]``.

The learning rate of every method and task is chosen on the validation split (mean over seeds), and
all else is read at that rate. Intervals are percentile bootstraps over seeds; a comparison with
plain LoRA pairs the runs of one task and seed: same data, same order.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.quality.experiment import CURVE_PERCENT, Experiment
from benchmarks.quality.kinds import FRESH_TASKS, defaults
from benchmarks.quality.records import RESULTS, Record, read_records
from benchmarks.quality.stages import BASELINE, best_rates

RESAMPLES = 10_000
FEWEST_SEEDS = 4
"""With fewer, a bootstrap interval says little more than the smallest and the largest: none is given."""
FEW = 64
"""Training samples of the few-shot comparison."""
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "quality.png"


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean."""
    data = np.asarray(values, dtype=float)
    if len(data) < FEWEST_SEEDS:
        return (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = data[generator.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def stratified(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean over groups (tasks), resampled within each."""
    groups = [np.asarray(g, dtype=float) for g in groups if len(g)]
    if not groups or min(map(len, groups)) < FEWEST_SEEDS:
        return (math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for data in groups:
        means += data[generator.integers(0, len(data), (RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means / len(groups), (0.025, 0.975))
    return float(low), float(high)


def sign_flip(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test of the mean: signs flipped at random.

    Exact up to sixteen pairs. Five pairs cannot go below 1/16: pool tasks for a finer answer.
    """
    data = np.asarray(differences, dtype=float)
    if not len(data) or not np.any(data):
        return 1.0
    count = len(data)
    if count <= 16:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        signs = 1.0 - 2.0 * bits
    else:
        signs = np.random.default_rng(seed).choice((-1.0, 1.0), (20_000, count))
    means = np.abs((signs * data).mean(1))
    return float((means >= abs(data.mean()) * (1 - 1e-12)).mean())


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float:
    """First step at which the curve is at or below the target, between points on a line.

    Infinite where it never is.
    """
    previous: tuple[float, float] | None = None
    for step, loss in zip(steps, losses, strict=True):
        if math.isnan(loss):
            continue
        if loss <= target:
            if previous is None or previous[1] <= loss:
                return float(step)
            share = (previous[1] - target) / (previous[1] - loss)
            return previous[0] + share * (step - previous[0])
        previous = (step, loss)
    return math.inf


def area(steps: Sequence[float], losses: Sequence[float], until: float | None = None) -> float:
    """Mean of the curve over its steps, by trapezoids, up to the step `until`."""
    x, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    end = x[-1] if until is None else until
    inside = x < end
    x, y = np.append(x[inside], end), np.append(y[inside], np.interp(end, x, y))
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def good_range(rates: Sequence[float], scores: Sequence[float], tolerance: float = 0.02) -> float:
    """Decades of learning rate around the best whose score is within 2% of it.

    Between grid points the score is a line over the logarithm of the rate; a range ends
    at the grid's ends.
    """
    order = np.argsort(rates)
    x, y = np.log10(np.asarray(rates)[order]), np.nan_to_num(np.asarray(scores)[order])
    if y.max() <= 0:
        return 0.0
    fine = np.linspace(x[0], x[-1], 1001)
    good = np.interp(fine, x, y) >= (1 - tolerance) * y.max()
    top = int(np.argmax(np.interp(fine, x, y)))
    low = high = top
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(fine) - 1 and good[high + 1]:
        high += 1
    return float(fine[high] - fine[low])


def finite(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass
class Line:
    """One method on one task, at the learning rate that validation chose; lists run over seeds."""

    task: str
    label: str
    rate: float
    seeds: list[int] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    heldout: list[tuple[list[float], list[float]]] = field(default_factory=list)
    percent: list[list[float]] = field(default_factory=list)
    init_seconds: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    steps_to: list[float] = field(default_factory=list)
    seconds_to: list[float] = field(default_factory=list)
    early: list[float] = field(default_factory=list)
    area: list[float] = field(default_factory=list)


def collect_lines(records: Iterable[Record]) -> dict[tuple[str, str], Line]:
    """All lines of one budget, with what compares them to plain LoRA's final loss."""
    records = [r for r in records if "test" in r]
    rates = best_rates(records, 1, by="exact")
    lines: dict[tuple[str, str], Line] = {}
    for record in sorted(records, key=lambda r: r["seed"]):
        key = (record["task"], record["label"])
        if record["learning_rate"] != rates[key][0]:
            continue
        line = lines.setdefault(key, Line(*key, rates[key][0]))
        line.seeds.append(record["seed"])
        line.exact.append(finite(record["test"]["exact"]))
        line.loss.append(finite(record["test"]["loss"]))
        curve = record["heldout"]
        line.heldout.append((curve["steps"], [finite(v) for v in curve["loss"]]))
        at = record["heldout_at_percent"]
        line.percent.append([finite(at[str(p)]) for p in CURVE_PERCENT])
        line.init_seconds.append(record["init_seconds"])
        line.train_seconds.append(record["train_seconds"])
    for (task, _), line in lines.items():
        base = lines.get((task, BASELINE))
        for i, (steps, losses) in enumerate(line.heldout):
            line.area.append(area(steps, losses))
            target = _final(base, line.seeds[i])
            to = crossing(steps, losses, target)
            line.steps_to.append(to)
            each = line.train_seconds[i] / steps[-1]
            line.seconds_to.append(line.init_seconds[i] + each * to)
            line.early.append(area(steps, losses, until=0.1 * steps[-1]) - target)
    return lines


def _final(base: Line | None, seed: int) -> float:
    """Plain LoRA's final held-out loss: of the same seed, else the mean."""
    if base is None:
        return math.nan
    finals = [curve[1][-1] for curve in base.heldout]
    return finals[base.seeds.index(seed)] if seed in base.seeds else float(np.mean(finals))


def compare(line: Line, base: Line) -> tuple[float, float, float, float]:
    """Mean paired difference in exact match, its interval, and the p-value."""
    differences = paired(line, base)
    low, high = bootstrap(differences)
    mean = float(np.mean(differences)) if differences else math.nan
    return mean, low, high, sign_flip(differences)


def paired(line: Line, base: Line) -> list[float]:
    """Differences in test exact match over the seeds that both have."""
    at = dict(zip(base.seeds, base.exact, strict=True))
    pairs = zip(line.seeds, line.exact, strict=True)
    return [value - at[seed] for seed, value in pairs if seed in at]


# --- tables ------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return "–"
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan


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


def good_ranges(records: Iterable[Record]) -> dict[str, float]:
    """By method: decades of good learning rates, mean over tasks."""
    widths: dict[str, list[float]] = defaultdict(list)
    for (_, label), points in _by_rate(records).items():
        widths[label].append(good_range(list(points), list(points.values())))
    return {label: mean(values) for label, values in widths.items()}


def _by_rate(records: Iterable[Record]) -> dict[tuple[str, str], dict[float, float]]:
    """Exact match on validation, mean over seeds, by task and method, then by learning rate."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        value = finite(record["validation"]["exact"])
        scores[record["task"], record["label"]][record["learning_rate"]].append(value)
    return {
        key: {rate: mean(values) for rate, values in sorted(points.items())}
        for key, points in scores.items()
    }


def range_table(records: Iterable[Record]) -> str:
    """Good range of learning rates, from the search: exact match on validation."""
    records = list(records)
    widths, scores = good_ranges(records), _by_rate(records)
    rows = []
    for label in ordered(widths):
        best = {
            max(points, key=lambda rate: float(np.nan_to_num(points[rate])))
            for (_, name), points in scores.items()
            if name == label
        }
        rates = ", ".join(f"{rate:.2g}" for rate in sorted(best))
        rows.append([label, number(widths[label], 2), rates])
    return table(["method", "decades within 2% of its best", "best rates, over tasks"], rows)


def sweep_table(records: Iterable[Record], over: str) -> str:
    """Exact match by the value of one budget, beside plain LoRA's with the same budget.

    Not every line has every task, so each is compared on the tasks that it shares with plain LoRA.
    """
    by_value: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_value[record["experiment"][over]].append(record)
    values = sorted(by_value)
    cells = {value: collect_lines(by_value[value]) for value in values}
    labels = ordered({label for lines in cells.values() for _, label in lines})
    return table(
        ["method", *map(str, values)],
        [[label, *(_sweep_cell(cells[value], label) for value in values)] for label in labels],
    )


def _sweep_cell(lines: dict[tuple[str, str], Line], label: str) -> str:
    mine = {task: line for (task, name), line in lines.items() if name == label}
    if label == BASELINE:
        scores = [mean(line.exact) for line in mine.values()]
        return f"{100 * mean(scores):.1f} ({len(scores)})" if scores else "–"
    pairs = [(line, lines[t, BASELINE]) for t, line in mine.items() if (t, BASELINE) in lines]
    groups = [found for line, base in pairs if (found := paired(line, base))]
    if not groups:
        return "–"
    return f"{100 * mean([mean(group) for group in groups]):+.1f} ({len(groups)})"


def axes_of(lines: dict[tuple[str, str], Line]) -> tuple[list[str], list[str]]:
    return sorted({t for t, _ in lines}), ordered({label for _, label in lines})


def ordered(labels: Iterable[str]) -> list[str]:
    return sorted(labels, key=lambda name: (name != BASELINE, name))


def report(records: Iterable[Record]) -> str:
    """All tables that the records allow, in Markdown, one part a model."""
    from benchmarks.quality.rule import fresh_table, rule_table

    records = in_order(records)
    parts = ["# Quality: what the records say", f"{len(records)} runs."]
    parts += ["## The default, by the rule of benchmarks/README.md", rule_table(chosen_on(records))]
    if any(r["task"] in FRESH_TASKS for r in records):
        parts += ["### Where choices were made, and where not"]
        parts += [fresh_table(by_model(records), FRESH_TASKS)]
    for model, mine in by_model(records).items():
        parts += [f"## {model}", *_part(mine)]
    return "\n\n".join(parts) + "\n"


def in_order(records: Iterable[Record]) -> list[Record]:
    """By stage and id, so that a bootstrap draws the same numbers however the records are stored."""
    return sorted(records, key=lambda record: (record["stage"], record["id"]))


def _part(records: Sequence[Record]) -> list[str]:
    """The tables of one model."""
    from benchmarks.quality.claims import aims_table, claims_table, forgetting_table

    by_stage: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_stage[record["stage"]].append(record)
    final = by_stage["seeds"]
    swept = sweeps_of(records)
    few_shot = [r for r in by_stage["sweep"] if r["experiment"]["train_samples"] == FEW]
    parts = []
    if final:
        lines = collect_lines(final)
        seeds = sorted({r["seed"] for r in final})
        parts += [
            f"### Final score, % right (test split, {len(seeds)} seeds, 95% intervals)",
            final_table(lines),
            "### Against plain LoRA, over tasks",
            comparison_table(lines),
            "### The papers' claims, and ours",
            claims_table(lines, swept.get("rank", ())),
            "### Against the best of all others",
            aims_table(lines, by_stage["search"], few_shot),
            "### Held-out loss at a share of the steps, mean over tasks",
            curve_table(lines),
        ]
        if any("other" in r for r in final):
            parts += [
                "### Loss on another task: rise by fine-tuning",
                forgetting_table(lines, final),
            ]
    if by_stage["search"]:
        parts += ["### Learning rates (short budget, one seed)", range_table(by_stage["search"])]
    for over, mine in swept.items():
        parts += [
            f"### Final score by {over}: plain LoRA's, % right; others: points above it (tasks)",
            sweep_table(mine, over),
        ]
    diverged = [r for r in records if r["diverged"]]
    if diverged:
        labels = sorted({f"{r['label']} at {r['learning_rate']:.2g}" for r in diverged})
        parts += [f"### Diverged: {len(diverged)} runs", ", ".join(labels)]
    return parts


def sweeps_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By the budget that was changed: its runs, and those of the final tables at the standard value."""
    records = list(records)
    final = [r for r in records if r["stage"] == "seeds"]
    swept: dict[str, list[Record]] = {}
    for over in ("rank", "train_samples", "statistics_samples"):
        mine = [r for r in records if r["stage"] == "sweep" and _swept(r) == over]
        tasks, labels = {r["task"] for r in mine}, {r["label"] for r in mine}
        same = [r for r in final if r["task"] in tasks and r["label"] in labels]
        if mine and over == "statistics_samples":
            # Plain LoRA reads none: its runs stand beside every number.
            plain = [r for r in final if r["task"] in tasks and r["label"] == BASELINE]
            numbers = {r["experiment"][over] for r in mine + plain}
            same += [
                r | {"experiment": r["experiment"] | {over: count}}
                for count in numbers
                for r in plain
            ]
        if mine:
            swept[over] = mine + same
    return swept


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The language model first."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: ("smollm2" not in _model(r), _model(r))):
        found[_model(record)].append(record)
    return dict(found)


def chosen_on(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By model, without the tasks that no choice was made on."""
    return by_model(r for r in records if r["task"] not in FRESH_TASKS)


def _model(record: Record) -> str:
    """The model; tasks that no choice was made on stand by themselves."""
    model = str(record["experiment"]["model"])
    return f"{model}, fresh tasks" if record["task"] in FRESH_TASKS else model


def _swept(record: Record) -> str:
    """Which budget a sweep's record differs in from the standard one."""
    standard = Experiment(record["task"], record["method"], 1.0, **defaults(record["task"]))
    for over in ("rank", "train_samples", "statistics_samples"):
        if record["experiment"][over] != getattr(standard, over):
            return over
    return "rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="of the final scores; default: the docs'")
    arguments = parser.parse_args()
    here = arguments.out.resolve() == RESULTS.resolve()
    picture = arguments.picture or (PICTURE if here else arguments.out / PICTURE.name)
    records = in_order(read_records(arguments.records).values())
    text = report(records)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    from benchmarks.quality.figures import differences, figures
    from benchmarks.quality.panels import beside, sweeps

    final = [r for r in records if r["stage"] == "seeds"]
    print(differences({m: collect_lines(v) for m, v in chosen_on(final).items()}, picture))
    for model in sorted({_model(r) for r in records if r["task"] not in FRESH_TASKS}):
        mine = [r for r in records if _model(r) == model]
        final = [r for r in mine if r["stage"] == "seeds"]
        search = [r for r in mine if r["stage"] == "search"]
        lines = collect_lines(final)
        for path in figures(lines, search, arguments.out, model):
            print(path)
        if swept := sweeps_of(mine):
            print(sweeps(swept, arguments.out / f"budgets-{model}.png"))
        print(beside(lines, final, arguments.out / f"speed-{model}.png"))


if __name__ == "__main__":
    main()
