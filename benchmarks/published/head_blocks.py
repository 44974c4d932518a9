"""What the block about fitted heads says, from the records of the stage "heads"."""

from __future__ import annotations

from benchmarks.published.sources import beside_plain, own_records
from benchmarks.quality.analysis.markdown import table
from benchmarks.quality.analysis.rate_grid import BASELINE, Cells, cells_of
from benchmarks.quality.records import Record
from lorainit.pipeline.heads import TIMES_AS_MANY

_MODELS = {"all-minilm-l6-v2": "sentences", "vit-mnist": "images"}


def seen_by_head(record: Record) -> int:
    """Sequences that a head was fitted on; some of them held back."""
    experiment = record["experiment"]
    times = TIMES_AS_MANY * experiment["statistics_samples"]
    return int(min(times, experiment["train_samples"]))


def head_cells(model: str) -> dict[tuple[float, int], Cells]:
    """Plain LoRA with a head that went a part of the way, by part and sequences, and with a random one."""
    lines: dict[tuple[float, int], list[Record]] = {}
    plain = [r for r in own_records(model) if r["stage"] == "grid" and r["label"] == BASELINE]
    for record in own_records(model):
        part = record["experiment"]["settings"].get("fitted")
        if record["stage"] == "heads" and record["method"] == BASELINE and part:
            lines.setdefault((part, seen_by_head(record)), []).append(record | {"stage": "grid"})
    found = {}
    for key, mine in sorted(lines.items()):
        rates = set.intersection(*(
            {r["learning_rate"] for r in mine if r["task"] == task and r["seed"] == seed}
            for task, seed in {(r["task"], r["seed"]) for r in mine}
        ))  # fmt: skip
        found[key] = cells_of([*plain, *mine], rates=rates, least=rates)
    return found


def parts_of_heads() -> str:
    """Test loss and right answers beside plain LoRA's under a random head, by part of the way and sequences."""
    rows = []
    for model, name in _MODELS.items():
        for (part, sequences), cells in head_cells(model).items():
            (label,) = {line for lines in cells.values() for line in lines} - {BASELINE}
            rows.append([name, f"{part:g}", f"{sequences:,}", *beside_plain(label, cells)[1]])
    heads = [
        "data", "part of the way", "sequences", "tasks x least seeds", "test loss, each tuned",
        "points, tuned", "test loss, both at 1e-4",
    ]  # fmt: skip
    return table(heads, rows)
