"""What was given back of what quantization took, read from the records and set beside what was aimed at."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import json_lines
from benchmarks.common.cache import REPOSITORY

Record = Mapping[str, Any]

RESULTS = REPOSITORY / "benchmarks" / "quantized" / "results"

KEY = (
    "model", "data", "kind", "method", "statistics", "rank", "rows", "held_out", "length"
)  # fmt: skip
"""What a record is told apart by."""

NAMES = {"both sides": "KroneckerQER", "QERA diagonal": 'QERA("diagonal")'}
"""Of methods whose records have another name than their class."""

METHODS = ("LoftQ", "QERA diagonal", "QERA", "both sides")
"""In the order of the tables."""

NOTHING = "nothing"
"""The quantized model as it is."""

PEFT_ONE, PEFT_OTHER = "PEFT loftq, s = 1", "PEFT loftq, s = 16/sqrt(r)"
"""PEFT's own function, at the scaling that it is right for and at one that it is not."""

KINDS = {
    "nf4": "NF4",
    "nf4-double": "NF4, double",
    "hqq4": "HQQ 4",
    "hqq3": "HQQ 3",
    "hqq2": "HQQ 2",
}
"""The grids of the tables: the real quantizers."""

MODELS = ("SmolLM2-135M", "Gemma-3-270M", "all-MiniLM-L6-v2")

AIMS = {
    ("SmolLM2-135M", "nf4", 8): 0.55,
    ("SmolLM2-135M", "nf4", 32): 0.70,
    ("Gemma-3-270M", "nf4", 8): 0.50,
    ("Gemma-3-270M", "nf4", 32): 0.65,
}
"""Share of the KL on text that should be gone before any training, by model, grid and rank."""


def key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY)


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every record of a folder's ``recovery*.jsonl``; of one that was made twice the newest.

    Records without ``"statistics"`` are of the quantized model's.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    records = [r for path in sorted(folder.glob("recovery*.jsonl")) for r in json_lines.read(path)]
    for record in sorted(records, key=lambda r: r.get("date", "")):
        reads = record["method"] not in (NOTHING, "LoftQ")
        whole = {"statistics": "quantized" if reads else "none"} | record
        found[key(whole)] = whole
    return list(found.values())


def share_gone(record: Record, name: str) -> float:
    """What share of the divergence, or of the rise of the ``"loss"``, that quantization brought is gone."""
    least = record["full_loss"] if name == "loss" else 0.0
    before = record[f"{name}_before"]
    return float((before - record[name]) / (before - least))


def divergence(record: Record) -> str:
    """The name of a record's distance to the full-precision model."""
    return "distance" if "distance" in record else "kl"


def of(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose fields are these; a tuple: any of them."""
    return [
        r
        for r in records
        if all(r[n] in v if isinstance(v, tuple) else r[n] == v for n, v in wanted.items())
    ]


def recovered(records: Sequence[Record], ranks: Sequence[int], data: str = "text") -> str:
    """A line a model, grid and rank: what quantization took, and how much of it each start gives back.

    Statistics are the quantized model's.
    """
    heads = ["model", "grid, rank", "taken", *(NAMES.get(m, m) for m in METHODS), "aim"]
    rows = []
    for model, kind, rank in _cells(records, ranks, data=data):
        mine = of(records, model=model, kind=kind, rank=rank, data=data)
        mine = [r for r in mine if r["statistics"] != "full"]
        by_method = {r["method"]: r for r in mine}
        aim = AIMS.get((model, kind, rank)) if data == "text" else None
        rows.append(
            [
                model,
                f"{KINDS[kind]}, {rank}",
                _taken(mine[0]),
                *(_shares(by_method[m]) if m in by_method else "" for m in METHODS),
                "" if aim is None else f"{aim:.0%}",
            ]
        )
    return markdown(heads, rows)


def over_tasks(records: Sequence[Record], ranks: Sequence[int]) -> str:
    """The same on tasks: the mean over tasks of the share of the divergence, and the least of them."""
    heads = ["model", "grid, rank", "tasks", *(NAMES.get(m, m) for m in METHODS)]
    rows = []
    others = [r for r in records if r["data"] != "text"]
    for model, kind, rank in _cells(others, ranks):
        mine = of(others, model=model, kind=kind, rank=rank, method=METHODS)
        mine = [r for r in mine if r["statistics"] != "full"]
        # Where one start was not measured, the others' means leave the task out as well.
        common = set.intersection(
            *({r["data"] for r in of(mine, method=m)} for m in METHODS if of(mine, method=m))
        )
        mine = of(mine, data=tuple(common))
        cells = []
        for method in METHODS:
            shares = [share_gone(r, divergence(r)) for r in of(mine, method=method)]
            cells.append(f"{statistics.mean(shares):.0%} ({min(shares):.0%})" if shares else "")
        if common:
            rows.append([model, f"{KINDS[kind]}, {rank}", str(len(common)), *cells])
    return markdown(heads, rows)


def by_statistics(records: Sequence[Record]) -> str:
    """Statistics of the full-precision model beside those of the quantized one, by model, start and grid.

    The mean difference of the divergence gone, in points, over data sets and ranks, and how often it is
    above zero.
    """
    rows = []
    for model in MODELS:
        for method in METHODS[1:]:
            cells = []
            for kind in KINDS:
                pairs = _pairs(of(records, model=model, kind=kind, method=method))
                points = [100 * (full - quantized) for quantized, full in pairs]
                better = f"{sum(p > 0 for p in points)} of {len(points)}"
                cells.append(f"{statistics.mean(points):+.1f} ({better})" if points else "")
            if any(cells):
                rows.append([model, NAMES.get(method, method), *cells])
    return markdown(["model", "start", *KINDS.values()], rows)


def beside_peft(records: Sequence[Record]) -> str:
    """PEFT's ``replace_lora_weights_loftq`` beside `LoftQ` and `KroneckerQER`, on text at NF4."""
    columns = {
        PEFT_ONE: "PEFT's function, s = 1",
        PEFT_OTHER: "the same, s = 16/√r",
        "LoftQ": "LoftQ, s = 16/√r",
        "both sides": "KroneckerQER",
    }
    rows = []
    for model in MODELS:
        theirs = of(records, model=model, kind="nf4", data="text", method=PEFT_ONE)
        for rank in sorted({r["rank"] for r in theirs}):
            mine = of(records, model=model, kind="nf4", data="text", rank=rank)
            cells = {r["method"]: _shares(r) for r in mine if r["statistics"] != "full"}
            rows.append([model, str(rank), *(cells.get(method, "") for method in columns)])
    return markdown(["model", "rank", *columns.values()], rows)


def tables(records: Sequence[Record]) -> str:
    """All of them, with every rank that there is."""
    ranks = sorted({r["rank"] for r in records} - {0})
    parts = {
        "Text, before any training: divergence gone / rise of the loss gone": recovered(
            records, ranks
        ),
        "Tasks: mean share of the divergence gone (the least of them)": over_tasks(records, ranks),
        "Statistics of the full-precision model: points of the divergence gone above those with the "
        "quantized model's (how often above)": by_statistics(records),
        "PEFT's own function, text": beside_peft(records),
    }
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in parts.items())


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(
    records: Iterable[Record], ranks: Sequence[int], **wanted: Any
) -> list[tuple[str, str, int]]:
    """Models, grids and ranks that some start was measured at, in the order of the tables."""
    have = {(r["model"], r["kind"], r["rank"]) for r in of(records, method=METHODS, **wanted)}
    return [
        (model, kind, rank)
        for model in MODELS
        for kind in KINDS
        for rank in ranks
        if (model, kind, rank) in have
    ]


def _taken(record: Record) -> str:
    name = divergence(record)
    taken = f"{record[f'{name}_before']:.3g}"
    if "full_loss" not in record:
        return taken
    return f"{taken} / {record['loss_before'] - record['full_loss']:.3g}"


def _shares(record: Record) -> str:
    found = f"{share_gone(record, divergence(record)):.0%}"
    return found if "full_loss" not in record else f"{found} / {share_gone(record, 'loss'):.0%}"


def _pairs(records: Iterable[Record]) -> list[tuple[float, float]]:
    """Shares gone with either statistics, where both were measured."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        place = tuple(record[name] for name in KEY if name != "statistics")
        share = share_gone(record, divergence(record))
        found.setdefault(place, {})[record["statistics"]] = share
    return [(s["quantized"], s["full"]) for s in found.values() if {"quantized", "full"} <= set(s)]
