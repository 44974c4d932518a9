"""What each block says, from the kept records."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable

from benchmarks.common.cache import REPOSITORY
from benchmarks.published.head_blocks import parts_of_heads
from benchmarks.published.rate_blocks import (
    fixed_rates,
    matched_at,
    matched_lines,
    matched_ranks,
    matched_rates,
    row_sizes,
    run_lengths,
    suggested_lengths,
    suggested_ranks,
    suggested_rates,
    suggested_rates_by_model,
    warmups,
)
from benchmarks.published.sources import (
    MODEL,
    NAMES,
    at_rate,
    beside_plain,
    fresh_cells,
    grid,
    grid_cells,
    lengths,
    quantized_cells,
    rate_cases,
    recovered_on_text,
    recovery,
    start_seconds,
    tuned,
)
from benchmarks.quality.analysis.grid_comparison import compared, differences
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import BASELINE, Cells, cells_of, labels_of, tuned_loss
from benchmarks.quality.analysis.steps_of_runs import steps_of_runs
from benchmarks.quality.analysis.suggested_rates import quantiles
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.records import read_records
from benchmarks.quantized import recovery_tables
from benchmarks.quantized.optimality import table as optimality_table
from benchmarks.quantized.recovery_tables import share_gone
from benchmarks.studies import RESULTS as STUDIES
from lorainit.calibration.learning_rate import suggested

GEMMA, IMAGES = "gemma-3-270m", "vit-mnist"

_QUANTIZED = {
    "vanilla": "plain LoRA (QLoRA)",
    "loftq(reference=True)": "LoftQ",
    "qera(reference=True)": "QERA",
    "kronecker-qer(reference=True)": "KroneckerQER",
    "natural": "Natural, no reference",
    "auto(reference=True)": "Auto with reference",
    "auto(joined=True,reference=True)": "given back and Natural's step in one, Auto until November 29",
    "auto(least_taken=0.0,reference=True)": "Auto(least_taken=0) with reference",
}

_FIXED = (1e-4, 2e-4, 4.5e-4, 1e-3, 2.2e-3)

_KINDS = {
    "nf4": "NF4 (bitsandbytes' values)",
    "hqq4": "HQQ, 4 bits",
    "hqq3": "HQQ, 3 bits",
    "hqq2": "HQQ, 2 bits",
}


def quantized_recovery() -> str:
    """By model, grid and rank: what each start gives back before any training, on plain text."""
    return recovery_tables.recovered(recovery(), (8, 32))


def quantized_recovery_tasks() -> str:
    """The same over tasks."""
    return recovery_tables.over_tasks(recovery(), (8, 32))


def quantized_statistics() -> str:
    """Statistics of the full-precision model beside the quantized one's."""
    return recovery_tables.by_statistics(recovery())


def quantized_peft() -> str:
    """PEFT's own LoftQ beside the package's."""
    return recovery_tables.beside_peft(recovery())


def closed_forms() -> str:
    """Each method in its own metric against the least possible, over all layers."""
    path = REPOSITORY / "benchmarks" / "quantized" / "results" / "optimality.jsonl"
    return optimality_table([json.loads(line) for line in path.read_text().splitlines()])


def quantized_trained() -> str:
    """After training, each line at its best rate, beside plain LoRA on the same base and on the full one."""
    rows = []
    bases = [(MODEL, kind, name) for kind, name in _KINDS.items()]
    bases.append((GEMMA, "nf4", "Gemma 3 270M, NF4"))
    for model, kind, name in bases:
        cells, beside = quantized_cells(kind, model), differences(quantized_cells(kind, model))
        for label, shown in _QUANTIZED.items():
            mine = {task: lines[label] for task, lines in cells.items() if label in lines}
            if not mine:
                continue
            loss = points = ""
            seeds = [len(next(iter(line.values()))) for line in mine.values()]
            if label != BASELINE:
                seeds = [d.seeds for d in beside[label]]
                loss = str(Mean.of([d.loss for d in beside[label]]))
                points = Mean.of([d.exact for d in beside[label]]).rounded(1)
            full = grid_cells(model)
            above = [
                tuned_loss(line) - tuned_loss(full[task][BASELINE])
                for task, line in mine.items()
                if BASELINE in full.get(task, {})
            ]
            rows.append(
                [
                    name if label == BASELINE else "",
                    shown,
                    f"{len(mine)} x {min(seeds)}",
                    loss,
                    points,
                    f"{statistics.mean(above):+.3f}" if len(above) == len(mine) else "",
                ]
            )
    heads = [
        "base", "start", "tasks x least seeds", "test loss beside plain LoRA's on this base, nats",
        "exact match, points", "loss above plain LoRA on the full-precision base",
    ]  # fmt: skip
    return table(heads, rows)


def quantized_fixed_rates() -> str:
    """The same at fixed rates: test loss beside plain LoRA's, both at that rate, means over tasks."""
    rows = []
    for kind, name in _KINDS.items():
        cells = quantized_cells(kind)
        for label, shown in _QUANTIZED.items():
            if label != BASELINE and any(label in lines for lines in cells.values()):
                means = [f"{at_rate(label, rate, cells).value:+.3f}" for rate in _FIXED]
                rows.append([name, shown, *means])
    return table(["base", "start", *(f"{rate:g}" for rate in _FIXED)], rows)


def tuned_lines(cells: Cells) -> str:
    """Every line beside plain LoRA, each at its own best rate."""
    rows = []
    for label, tasks, _, corrected in compared(cells):
        mean = Mean.of([100 * d.loss for d in tasks])
        rows.append(
            [
                NAMES.get(label, label),
                f"{mean.tasks} x {min(d.seeds for d in tasks)}",
                mean.rounded(1),
                Mean.of([d.exact for d in tasks]).rounded(1),
                f"{mean.below}",
                f"{corrected:.2g}",
            ]
        )
    heads = [
        "line, each at its own best rate", "tasks x least seeds",
        "test loss beside plain LoRA's, hundredths of a nat [95% over tasks]", "exact match, points",
        "tasks below", "p of the loss, after Holm",
    ]  # fmt: skip
    return table(heads, rows)


def classifier(model: str) -> str:
    """A model with a head: every line beside plain LoRA, tuned and with both at 1e-4."""
    cells, rows = grid_cells(model), []
    for label in labels_of(cells):
        loss, said = beside_plain(label, cells)
        rows.append((loss.value, [NAMES.get(label, label), *said]))
    heads = [
        "line", "tasks x least seeds", "test loss beside plain LoRA's, each tuned", "points, tuned",
        "test loss, both at 1e-4",
    ]  # fmt: skip
    return table(heads, [row for _, row in sorted(rows, key=lambda r: r[0])])


def new_heads() -> str:
    """A new head, fitted first or random: mean test loss and right answers over the sources, by rate."""
    runs: dict[tuple[str, bool], dict[float, list[dict[str, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in read_records([STUDIES], "new_heads").values():
        place = runs[record["method"], record["fitted"]]
        place[record["learning_rate"]].append(record["test"])
    rates = sorted({rate for line in runs.values() for rate in line})
    rows = []
    for (method, fitted), line in sorted(runs.items(), reverse=True):
        cells = []
        for rate in rates:
            loss, right = (statistics.mean(r[key] for r in line[rate]) for key in ("loss", "exact"))
            cells.append(f"{loss:.3f}, {100 * right:.1f}%")
        rows.append(
            [
                {"plain": "plain LoRA", "natural": "Natural"}[method],
                "fitted" if fitted else "random",
                *cells,
            ]
        )
    return table(["start", "head", *(f"{rate:g}" for rate in rates)], rows)


def _below(mean: Mean) -> str:
    """So much below, with the interval, in positive numbers."""
    return f"{-mean.value:.3f} [{-mean.high:.3f}, {-mean.low:.3f}]"


def what_you_get() -> str:
    """The README's table."""
    nf4 = {r["method"]: r for r in recovered_on_text("nf4") if r["rank"] == 8}
    qer, loftq = nf4["both sides"], nf4["LoftQ"]
    # What Auto is there.
    line = "kronecker-qer(reference=True)"
    bases = [quantized_cells(kind) for kind in ("hqq3", "hqq2")]
    three, two = (tuned(line, cells) for cells in bases)
    three_low, two_low = (at_rate(line, 1e-4, cells) for cells in bases)
    regrets = [c.regret(suggested(c.two_steps)) for c in rate_cases(GEMMA)]
    common = [c.regret(1e-4) for c in rate_cases(GEMMA)]
    low, best = at_rate("auto", 1e-4), tuned("auto")
    told = [matched_at("auto", rate) for rate in (1e-4, 2e-4)]
    seen = grid_cells(IMAGES)
    images = Mean.of([d.exact for d in differences(seen)["auto"]])
    images_low = at_rate("auto", 1e-4, seen)
    brief = cells_of(lengths()[16])
    short, short_best = at_rate("auto", 1e-4, brief), tuned("auto", brief)
    ours, theirs = start_seconds("EVA"), 32 * start_seconds("PEFT EVA")
    rows = [
        [
            "a 4-bit base (NF4, rank 8)",
            f"{share_gone(qer, 'kl'):.0%} of the KL and {share_gone(qer, 'loss'):.0%} of the loss that "
            f"quantization cost are back before training; LoftQ's step: {share_gone(loftq, 'kl'):.0%} and "
            f"{share_gone(loftq, 'loss'):.0%}",
            "[quantized bases](docs/quantized.md)",
        ],
        [
            "a base of 3 or 2 bits, trained",
            f"test loss {-three_low.value:.3f} and {-two_low.value:.3f} nats below plain LoRA's on the same "
            f"base at a rate of 1e-4, {_below(three)} and {_below(two)} "
            "with tuned rates, over six tasks",
            "[after training](docs/quantized.md#after-training)",
        ],
        [
            "no time to search a learning rate",
            f"on a model that nothing was fitted on (Gemma 3, {len(regrets)} lines) the suggested one loses "
            f"{100 * statistics.median(regrets):.1f}% of what training gains "
            f"(nine in ten below {100 * quantiles(regrets)[1]:.1f}%); 1e-4 for all: "
            f"{100 * statistics.median(common):.1f}% ({100 * quantiles(common)[1]:.1f}%)",
            "[the rate](docs/learning_rate.md)",
        ],
        [
            "a recipe whose learning rate is fixed",
            f"the default, matched to it: test loss {told[0]} and {told[1]} nats beside plain LoRA's at 1e-4 "
            f"and 2e-4 ({told[0].below} and {told[1].below} of {told[1].tasks} tasks below; plain LoRA that is "
            "matched gains as much)",
            "[a fixed rate](docs/learning_rate.md#a-rate-that-is-fixed)",
        ],
        [
            "a small vision transformer with a new head (seven tasks)",
            f"the default's accuracy beside plain LoRA's, both tuned: {images.rounded(1)} points; test loss "
            f"with both at 1e-4: {images_low}",
            "[images](benchmarks/README.md)",
        ],
        [
            "time for a short run (16 steps)",
            f"the default's test loss beside plain LoRA's: {short} nats with both at 1e-4 ({short.below} of "
            f"{short.tasks} tasks below), {short_best} with both tuned",
            "[records](benchmarks/README.md#shorter-and-longer-runs)",
        ],
        [
            "labelled data, and nothing else",
            f"the default's test loss beside plain LoRA's: {low} nats with both at 1e-4 ({low.below} of "
            f"{low.tasks} tasks below), {best} with both tuned ({best.below})",
            "[records](benchmarks/README.md)",
        ],
        [
            "a 7B model and a method of PEFT's that reads data",
            f"EVA's start in {ours:.1f} s, PEFT's takes {theirs:.0f} (H200; one decoder layer, times 32)",
            "[performance](docs/performance.md)",
        ],
    ]
    return table(["you have", "you get", ""], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "quantized-recovery": quantized_recovery,
    "quantized-recovery-tasks": quantized_recovery_tasks,
    "quantized-statistics": quantized_statistics,
    "quantized-peft-loftq": quantized_peft,
    "closed-forms": closed_forms,
    "quantized-trained": quantized_trained,
    "quantized-fixed-rates": quantized_fixed_rates,
    "suggested-rates": suggested_rates,
    "suggested-rates-by-model": suggested_rates_by_model,
    "fixed-rates": fixed_rates,
    "matched-rates": matched_rates,
    "matched-rates-gemma": lambda: matched_rates(GEMMA),
    "matched-lines": matched_lines,
    "matched-ranks": matched_ranks,
    "run-lengths": run_lengths,
    "suggested-lengths": suggested_lengths,
    "row-sizes": row_sizes,
    "warmups": warmups,
    "tuned-lines": lambda: tuned_lines(grid_cells()),
    "tuned-lines-gemma": lambda: tuned_lines(grid_cells(GEMMA)),
    "fresh-tasks": lambda: tuned_lines(fresh_cells()),
    "suggested-ranks": suggested_ranks,
    "suggested-gemma": lambda: suggested_ranks(GEMMA),
    "suggested-fresh": lambda: suggested_ranks(fresh=True),
    "steps-of-runs": lambda: steps_of_runs(grid(), suggested),
    "sentences": lambda: classifier("all-minilm-l6-v2"),
    "images": lambda: classifier(IMAGES),
    "new-heads": new_heads,
    "parts-of-heads": parts_of_heads,
    "what-you-get": what_you_get,
}
"""By the name that stands in the page."""
