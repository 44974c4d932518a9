"""What the blocks about learning rates say, from the kept records."""

from __future__ import annotations

from benchmarks.published.sources import (
    MODEL,
    at_rate,
    grid_cells,
    lengths,
    named,
    of_chosen,
    own_records,
    rate_cases,
    tuned,
)
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.matched_runs import (
    by_line,
    by_rank,
    by_rate,
    by_size,
    by_warmup,
    gaps,
    matched,
    runs_of,
)
from benchmarks.quality.analysis.rate_grid import BASELINE
from benchmarks.quality.analysis.run_lengths import length_table, regret_table
from benchmarks.quality.analysis.suggested_rates import by_model
from benchmarks.quality.analysis.suggested_rates import table as rates_table
from benchmarks.quality.analysis.suggested_runs import suggested_table
from benchmarks.quality.analysis.t_tests import Mean
from benchmarks.quality.experiment import GRID
from benchmarks.quality.records import RESULTS, read_records
from lorainit.calibration.learning_rate import suggested

_HALF_TO_16 = (0.5, 2.0, 4.0, 8.0, 16.0)

_BOTH = (BASELINE, "auto")

_SHORT_RUNS = (
    "auto",
    "natural(steps=4)",
    "vanilla(size=2)",
    "lora-da(scale=calibrated)",
    "lora-ga",
)

_TOLD = ("auto", "lora-da", "pissa", "eva", "lora-ga")

_SIZES = {
    "plain LoRA": {1.0: BASELINE, 2.0: "vanilla(size=2)"}
    | {size: f"vanilla(size={size})" for size in _HALF_TO_16 if size != 2},
    "Natural": {1.0: "auto"}
    | {size: f"natural(activation={size / 2},spare={size * 2})" for size in _HALF_TO_16},
}
"""Natural at its own sizes is what Auto is on these tasks."""


def suggested_rates() -> str:
    """Regret of the suggested rate and of fixed ones, on the model that the law was fitted on."""
    return rates_table(rate_cases(), suggested)


def suggested_rates_by_model() -> str:
    """Regret in percent, median / nine in ten below, on every model."""
    return by_model(rate_cases(None), suggested)


def fixed_rates() -> str:
    """Auto beside plain LoRA at every rate of the grid."""
    rows = [
        [f"{rate:g}", str(mean), f"{mean.below} of {mean.tasks}"]
        for rate in GRID
        for mean in [at_rate("auto", rate)]
    ]
    best = tuned("auto")
    rows.append(["each at its best", str(best), f"{best.below} of {best.tasks}"])
    return table(
        ["learning rate", "Auto's test loss above plain LoRA's, nats", "tasks below"], rows
    )


def suggested_ranks(model: str = MODEL, *, fresh: bool = False) -> str:
    """Auto beside plain LoRA by rank, each at the rate suggested for it, on chosen tasks or on fresh ones."""
    every, chosen = own_records(model), of_chosen(own_records(model))
    return suggested_table([r for r in every if r not in chosen] if fresh else chosen)


def matched_at(label: str, rate: float) -> Mean:
    """Test loss of a line that is told a rate, above plain LoRA's at that rate."""
    told, grid = (runs_of(of_chosen(own_records()), stage) for stage in ("matched", "grid"))
    return Mean.of(gaps(told[matched(label)], grid[BASELINE].get, rate))


def matched_rates(model: str = MODEL) -> str:
    """Auto and plain LoRA told their rate, beside plain LoRA at that rate."""
    return by_rate(of_chosen(own_records(model)), grid_cells(model))


def matched_lines() -> str:
    """Methods that are told 2e-4."""
    return by_line(of_chosen(own_records()), named(_TOLD), 2e-4)


def run_lengths() -> str:
    """Lines beside plain LoRA by number of steps."""
    return length_table(lengths(), named(_SHORT_RUNS))


def suggested_lengths() -> str:
    """Regret of the suggested rate by number of steps."""
    said = list(read_records([RESULTS], "suggestions").values())
    return regret_table(lengths(), said, named(_BOTH), suggested)


def matched_ranks() -> str:
    """One rate for all ranks, under a warmup of a tenth of the steps."""
    return by_rank(own_records())


def row_sizes() -> str:
    """Rows of other sizes at every rate."""
    lines = {name: dict(sorted(labels.items())) for name, labels in _SIZES.items()}
    return by_size(own_records(), grid_cells(), lines)


def warmups() -> str:
    """A warmup of a tenth of the steps beside one of three hundredths."""
    lines = {"plain LoRA": BASELINE, "**Auto**": "auto", "EVA": "eva", "LoRA-GA": "lora-ga"}
    return by_warmup(own_records(), lines)
