"""Tables of docs/scaling.md."""

from __future__ import annotations

from benchmarks.scaling.projection import constants, large
from benchmarks.scaling.records import Records, find, seconds_of_pass


def measured(records: Records) -> str:
    """One line a case, several processes beside one."""
    rows = [
        "| model on two cards | sequences of 512 | a batch | pass, one card | two cards | | "
        "solves, one | two | peak GiB of each card, one | two |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        if record.get("processes", 1) < 2 or "kind" not in record:
            continue
        one = find(records, 1, "plain", record["sequences"], record["batch"])
        alone, here = seconds_of_pass(one), seconds_of_pass(record)
        solves = [r["seconds"].get("solve_layers") for r in (one, record)]
        rows.append(
            f"| {'sharded' if record['kind'] == 'fsdp' else 'replicated'} | {record['sequences']} | "
            f"{record['batch']} | {alone:.2f} s | {here:.2f} s | **{alone / here:.2f} ×** | "
            + " | ".join("" if s is None else f"{s:.2f} s" for s in solves)
            + f" | {max(one['peak_gib']['pass']):.1f} | {max(record['peak_gib']['pass']):.1f} |"
        )
    return "\n".join(rows)


def tables(records: Records) -> str:
    known = constants(records)
    return "\n\n".join(
        [
            measured(records),
            f"pass: {known['flops'] / 1e12:.0f} TFLOP/s; links: {known['link'] / 1e9:.0f} GB/s a card and "
            f"direction; the whole reduction: {known['reduction'] / 1e9:.0f} GB/s",
            large(records),
        ]
    )
