"""All tables of the records, one part a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.quality.analysis.aims import aims_table
from benchmarks.quality.analysis.claims import claims_table
from benchmarks.quality.analysis.default_rule import fresh_table, rule_table
from benchmarks.quality.analysis.forgetting import forgetting_table
from benchmarks.quality.analysis.learning_rates import range_table
from benchmarks.quality.analysis.lines import collect_lines
from benchmarks.quality.analysis.sweeps import sweep_table, sweeps_of
from benchmarks.quality.analysis.tables import comparison_table, curve_table, final_table
from benchmarks.quality.models.registry import FRESH_TASKS
from benchmarks.quality.records import Record

FEW = 64
"""Training samples of the few-shot comparison."""


def report(records: Iterable[Record]) -> str:
    """All tables that the records allow, in Markdown, one part a model."""
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


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The language model first."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: ("smollm2" not in model_name(r), model_name(r))):
        found[model_name(record)].append(record)
    return dict(found)


def chosen_on(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By model, without the tasks that no choice was made on."""
    return by_model(r for r in records if r["task"] not in FRESH_TASKS)


def model_name(record: Record) -> str:
    """The model; tasks that no choice was made on stand by themselves."""
    model = str(record["experiment"]["model"])
    return f"{model}, fresh tasks" if record["task"] in FRESH_TASKS else model
