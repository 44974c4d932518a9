"""The page docs/architectures.md, and a summary to read, from records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.architectures.outcome import (
    FOREIGN,
    NOT_ALONE,
    NOT_WITH_PEFT,
    OUTCOMES,
    OWN,
    REFUSED,
    SAID,
    STARTS,
    WRONG,
    outcome,
    reason,
)
from benchmarks.architectures.tiny.families import FAMILIES
from benchmarks.common import json_lines

RESULTS = Path(__file__).parent / "results" / "architectures.jsonl"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
Records = list[dict[str, Any]]
_VERSIONS = ("transformers", "peft", "torch")


def read(paths: Iterable[Path]) -> Records:
    """Every entry's newest record, with its outcome and the versions that it was made with."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        made: dict[str, Any] = {}
        for line in json_lines.read(path):
            made = line.get("provenance", made)
            if "family" in line:
                versions = ", ".join(f"{k} {made[k]}" for k in _VERSIONS if k in made)
                newest[line["family"], line["name"]] = {"made": versions, **line}
    return [{**record, "outcome": outcome(record)} for record in newest.values()]


def keep(paths: Iterable[Path]) -> None:
    """Keep records in short, and write the page."""
    records = read(paths)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.unlink(missing_ok=True)
    for record in records:
        json_lines.add(_short(record), RESULTS)
    PAGE.write_text(page(records), encoding="utf-8")


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what only a search for a fault needs."""
    kept = ("family", "name", "class", "outcome", "targets", "batched", "made")
    short = {key: record[key] for key in kept if key in record}
    if record["outcome"] != STARTS:
        short["reason"] = reason(record)[:400]
    figures = record.get("numbers", {})
    for key in ("truth", "batching"):
        if key in figures:
            short[key] = {
                k: [n, v if isinstance(v, str) else float(f"{v:.2g}")]
                for k, (n, v) in figures[key].items()
            }
    return short


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.2g}")


def counts(records: Iterable[dict[str, Any]]) -> list[str]:
    """One row a family, and one of all."""
    by_family = {family: Counter[str]() for family in FAMILIES}
    for record in records:
        by_family[record["family"]][record["outcome"]] += 1
    rows = [
        "| mapping | entries | run by themselves | and with stock PEFT | fail for a reason of their own "
        f"| of the rest: start as they are | {REFUSED} | {FOREIGN} | {WRONG} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    total = sum(by_family.values(), Counter[str]())
    for name, found in [*by_family.items(), ("all", total)]:
        if not found:
            continue
        alone = found.total() - found[NOT_ALONE]
        adapted = alone - found[NOT_WITH_PEFT]
        rest = adapted - found[OWN]
        share = f" ({100 * found[STARTS] / rest:.1f}%)" if rest else ""
        rows.append(
            f"| {name} | {found.total()} | {alone} | {adapted} | {found[OWN]} | {found[STARTS]}{share} "
            f"| {found[REFUSED]} | {found[FOREIGN]} | {found[WRONG]} |"
        )
    return rows


def summary(paths: Iterable[Path]) -> str:
    """Counts, and every entry that does not start, with its reason."""
    records = read(paths)
    lines = counts(records)
    for kind in OUTCOMES:
        if kind != STARTS:
            some = [r for r in records if r["outcome"] == kind]
            lines += ["", f"{kind}: {len(some)}"]
            lines += [f"  {r['family']} {r['name']}: {reason(r)[:700]}" for r in some]
    return "\n".join(lines)


_HEAD = """# Architectures

Every entry of eleven mappings of transformers, as a tiny model with random weights: does it start by
the default method, LoRA-DA, FILet and EVA, with no argument but the data, and are the numbers right?
`python -m benchmarks.architectures` asks this, each entry in a process of its own. Records:
`benchmarks/architectures/results/architectures.jsonl` ({versions}).
"""
_MEANING = """
*Right* means: the mean gradient is that of autograd, of the loss that the model itself gives of each
row, to a thousandth; the second moments of what layers read are those that hooks on the model find; and
both are the same from padded batches of four as from single rows, unless the model's own outputs change
with the padding; base weights are the same to the bit, every layer that stock PEFT adapts is adapted,
and the disabled adapter is the base. Rows have an image or a sound wherever a form was found that the
model takes; else text alone. *A reason of its own* is one that a plain call of the model, or of
stock PEFT, shows too.
"""
_SECTIONS = (
    (REFUSED, "Refused in one line"),
    (OWN, "Fail for a reason of their own"),
    (FOREIGN, "Other exceptions"),
    (WRONG, "Wrong numbers"),
    (NOT_WITH_PEFT, "Run by themselves, and not with stock PEFT"),
)


def page(records: Records) -> str:
    """docs/architectures.md."""
    made = Counter(record.get("made", "") for record in records)
    versions = "; ".join(f"{count} entries with {words}" for words, count in made.most_common())
    parts = [_HEAD.format(versions=versions), *counts(records), _MEANING]
    for kind, title in _SECTIONS:
        some = [r for r in records if r["outcome"] == kind]
        if some:
            parts += [f"## {title}\n", "| entry | why |", "|---|---|"]
            parts += [f"| {r['family']} `{r['name']}` | {_cell(reason(r))} |" for r in some]
            parts.append("")
    started = [r for r in records if r["outcome"] == STARTS]
    for title, which in (
        (
            "Depend on padding by themselves: a row alone is not the same beside longer rows",
            _depends,
        ),
        ("Warned: where padding lies in some of their layers is not known", _warned),
    ):
        names = sorted({f"`{r['name']}`" for r in started if which(r)})
        if names:
            parts += [f"## {title}\n", ", ".join(names) + ".\n"]
    return "\n".join(parts).rstrip() + "\n"


def _warned(record: dict[str, Any]) -> bool:
    figures = record.get("numbers", {})
    lines = [*figures.get("said", ()), *figures.get("said_of_batches", ())]
    return any(SAID in line for line in lines)


def _depends(record: dict[str, Any]) -> bool:
    return "padding" in record.get("numbers", {})


def _cell(text: str) -> str:
    return (
        text.partition(" @ ")[0].replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")[:300]
    )
