"""Tables of recorded results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

SAMPLES = 100_000


def by_name(records: Iterable[Record]) -> dict[str, Record]:
    """The newest record of each case that did not fail."""
    return {r["name"]: r for r in records if "error" not in r}


def tables(records: Sequence[Record]) -> str:
    """Everything that is there, in Markdown."""
    known = by_name(records)
    parts = [
        _where(known),
        _starts(known),
        _solves(known),
        _peers(known),
        _growth(known),
        _blocks(known),
        _ranks(known),
        _precision(known),
        _objective(known),
        _share(known),
        _profiles(known),
        _failures(records, known),
    ]
    return "\n\n".join(part for part in parts if part)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; nothing where there are no rows."""
    body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if not body:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body])


def seconds(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def gib(value: float | None) -> str:
    """One digit after the point."""
    return "–" if value is None else f"{value:.1f}"


def pass_seconds(record: Record) -> float | None:
    """Plan, passes, and what makes statistics of their sums."""
    spent = record.get("seconds", {})
    if "pass" not in spent:
        return None
    return sum(spent.get(part, 0.0) for part in ("plan", "pass", "finish"))


def ratio(known: Mapping[str, Record], name: str) -> float | None:
    """A pass over the floor of its own batches."""
    record = known[name]
    keys = ("shape", "layers", "sequences", "tokens", "batch")
    own = pass_seconds(record)
    for other in known.values():
        if other.get("kind") == "floor" and all(other.get(k) == record.get(k) for k in keys):
            return None if own is None else own / other["seconds"]["floor"]
    return None


def _where(known: Mapping[str, Record]) -> str:
    made = known.get("provenance", {})
    shown = ("device", "torch", "transformers", "peft", "date")
    return ", ".join(f"{key} {made[key]}" for key in shown if key in made)


def _starts(known: Mapping[str, Record]) -> str:
    rows = []
    for name, r in known.items():
        if r.get("kind") not in ("floor", "pass", "start", "full") or "width" in r["shape"]:
            continue
        if r.get("method") in ("eva", "corda", "lora_ga") or "blocks" in name:
            continue
        spent, of_floor = r["seconds"], ratio(known, name)
        rows.append(
            [
                name,
                f"{r['sequences']} x {r['tokens']}, {r['batch']}",
                seconds(spent.get("floor", pass_seconds(r))),
                "" if of_floor is None else f"{of_floor:.2f}",
                seconds(spent.get("solve")),
                seconds(spent.get("install")),
                seconds(spent.get("total")),
                r.get("passes", ""),
                gib(r.get("peak_gib")),
            ]
        )
    return table(
        [
            "case",
            "data, batch",
            "pass s",
            "x floor",
            "solve s",
            "install s",
            "all s",
            "passes",
            "peak GiB",
        ],
        rows,
    )


def _solves(known: Mapping[str, Record]) -> str:
    rows = []
    if (start := known.get("LoRA-DA")) is not None:
        rows.append(["LoRA-DA, collected", seconds(start["seconds"].get("solve"))])
    if (full := known.get("full Sy")) is not None:
        for name in ("filet", "natural"):
            rows.append([f"{name}, collected", seconds(full["seconds"].get(f"solve {name}"))])
    rows += [
        [f"{r['method']}, made up", seconds(r["seconds"].get("solve"))]
        for r in known.values()
        if r.get("kind") == "solve"
    ]
    return table(["all layers' solves", "seconds"], rows)


def _peers(known: Mapping[str, Record]) -> str:
    rows = []
    for own, peer in (("EVA", "PEFT EVA"), ("CorDA", "PEFT CorDA"), ("LoRA-GA", "PEFT LoRA-GA")):
        if peer not in known:
            continue
        theirs = known[peer]
        row = [own, seconds(theirs["whole_seconds"]), gib(theirs.get("whole_peak_gib"))]
        for name in (own, f"{own}, PEFT's memory"):
            r = known.get(name)
            row += [seconds(r["seconds"]["total"]), gib(r.get("peak_gib"))] if r else ["–", "–"]
        rows.append([*row, theirs["measured_layers"]])
        same = known.get(f"{own}, PEFT's memory and sums")
        if same is not None:
            spent = seconds(same["seconds"]["total"]), gib(same.get("peak_gib"))
            kept = f"{own}, gradients added up in bfloat16"
            rows.append([kept, *row[1:3], "–", "–", *spent, theirs["measured_layers"]])
    return table(
        ["method", "PEFT s", "GiB", "here s", "GiB", "within PEFT's memory s", "GiB", "layers measured"],
        rows,
    )  # fmt: skip


def grown(known: Mapping[str, Record]) -> list[tuple[int, Record, Record]]:
    """Width, floor and start of one decoder layer."""
    found = []
    for name, r in known.items():
        if name.startswith("LoRA-DA, width ") and f"floor, {r['shape']}" in known:
            found.append((int(r["shape"].split()[1]), known[f"floor, {r['shape']}"], r))
    return sorted(found, key=lambda entry: entry[0])


def longer(known: Mapping[str, Record]) -> list[tuple[int, Record, Record]]:
    """Number of blocks, floor and start of a model block by block, its whole shape last."""
    found = []
    for name, r in known.items():
        if name.startswith("LoRA-DA within a budget, "):
            blocks = name.removeprefix("LoRA-DA within a budget, ")
            found.append((r["layers"], known.get(f"floor, {blocks}"), r))
    whole = known.get("LoRA-DA within 24 GiB, after others")
    if found and whole is not None:
        found.append((32, known.get("floor, 64 x 512"), whole))
    return [(n, low, r) for n, low, r in sorted(found, key=lambda e: e[0]) if low is not None]


def _growth(known: Mapping[str, Record]) -> str:
    rows = [
        [
            width,
            seconds(low["seconds"]["floor"]),
            seconds(pass_seconds(r)),
            seconds(r["seconds"]["solve"]),
        ]
        for width, low, r in grown(known)
    ]
    if "LoRA-DA, tokens x 4" in known and "floor, tokens x 4" in known:
        low, r = known["floor, tokens x 4"], known["LoRA-DA, tokens x 4"]
        rows.append(
            [
                f"{r['shape'].split()[1]}, tokens x 4",
                seconds(low["seconds"]["floor"]),
                seconds(pass_seconds(r)),
                seconds(r["seconds"]["solve"]),
            ]
        )
    return table(["one layer of width", "floor s", "pass s", "solve s"], rows)


def _blocks(known: Mapping[str, Record]) -> str:
    rows = [
        [
            blocks,
            r["options"]["max_memory"],
            seconds(low["seconds"]["floor"]),
            seconds(pass_seconds(r)),
            seconds(r["seconds"]["solve"]),
            gib(r.get("peak_gib")),
            r.get("passes", ""),
        ]
        for blocks, low, r in longer(known)
    ]
    head = ["blocks", "budget", "floor s", "pass s", "solve s", "peak GiB", "passes"]
    return table(head, rows)


def _ranks(known: Mapping[str, Record]) -> str:
    if "ranks" not in known:
        return ""
    spent = known["ranks"]["seconds"]
    ranks = known["ranks"]["options"]["ranks"]
    names = ("lora_da", "filet", "natural")
    rows = [[n, *(seconds(spent.get(f"{n} {rank}")) for rank in ranks)] for n in names]
    return table(["solve of one layer, seconds", *(f"rank {rank}" for rank in ranks)], rows)


def _precision(known: Mapping[str, Record]) -> str:
    apart = known.get("precision", {}).get("apart", {})
    rows = [
        [n, f"{a['sine']:.1e}", f"{a['product']:.1e}", seconds(a["fast_seconds"]), seconds(a["exact_seconds"])]
        for n, a in apart.items()
    ]  # fmt: skip
    return table(
        ["fast against exact", "sine of the angle", "B A apart", "fast s", "exact s"], rows
    )


def _objective(known: Mapping[str, Record]) -> str:
    values = known.get("objective", {}).get("objective", {})
    rows = [
        [name, f"{v['ours']:.6f}", f"{v['lobpcg']:.6f}", "–" if v["least"] is None else f"{v['least']:.6f}"]
        for name, v in values.items()
    ]  # fmt: skip
    return table(["LoRA-DA's objective", "here", "10 LOBPCG iterations", "least possible"], rows)


def _share(known: Mapping[str, Record]) -> str:
    if "share" not in known:
        return ""
    epoch = known["share"]["epoch_seconds"]
    rows = [
        [name, seconds(r["seconds"]["total"]), seconds(epoch), f"{r['seconds']['total'] / epoch:.2%}"]
        for name in ("LoRA-DA, 64 x 256", "LoRA-DA")
        if (r := known.get(name)) is not None
    ]  # fmt: skip
    return table(["start", "seconds", f"epoch of {SAMPLES:,} s", "share"], rows)


def _profiles(known: Mapping[str, Record]) -> str:
    parts = []
    for name, r in known.items():
        if not name.startswith("profile"):
            continue
        for part in ("floor_ms", "pass_ms", "solve_ms"):
            if part in r:
                rows = [
                    [f"`{key}`", *(value if isinstance(value, list) else [value, ""])]
                    for key, value in list(r[part].items())[:9]
                ]
                title = f"{name}: {part.removesuffix('_ms')}"
                parts.append(table([title, "ms", "calls"], rows))
        if "grams_ms" in r:
            rows = [[f"`{key}`", round(value, 1), ""] for key, value in r["grams_ms"].items()]
            parts.append(table([f"{name}: sums", "ms", ""], rows))
    return "\n\n".join(parts)


def _failures(records: Sequence[Record], known: Mapping[str, Record]) -> str:
    rows = {r["name"]: r["error"][:160] for r in records if "error" in r and r["name"] not in known}
    return table(["not measured", "why"], rows.items())
