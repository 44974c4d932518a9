"""From what was measured on two cards to LoRA-DA at 70B on many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.common.decoder import SHAPES, Shape
from benchmarks.scaling.records import Records, find, seconds_of_pass

BETWEEN_HOSTS = 40e9
"""Bytes a second that a card sends to other hosts; an assumption, nothing measured."""

ROOM = 90e9
"""Bytes of a card of 141 GB that sums may take, beside a sharded model and a batch."""

LARGE = Shape(8192, 28672, 80, 64, 8, 32000)

CARDS = (8, 64, 512)

TRIANGLE = 5 / 8
"""Of a Gram matrix, what travels."""

SAMPLE = (256, 1024)


def layers_of(shape: Shape) -> list[tuple[int, int]]:
    """``(out, in)`` of a block's seven projections."""
    keys = shape.hidden * shape.kv_heads // shape.heads
    small = [(shape.hidden, shape.hidden), (keys, shape.hidden), (keys, shape.hidden)]
    wide = [(shape.inner, shape.hidden)] * 2
    return [*small, (shape.hidden, shape.hidden), *wide, (shape.hidden, shape.inner)]


def inputs_of(shape: Shape) -> list[int]:
    """Widths of a block's four inputs."""
    return [shape.hidden, shape.hidden, shape.hidden, shape.inner]


def gradient_bytes(shape: Shape) -> float:
    return 4.0 * shape.layers * sum(out * inner for out, inner in layers_of(shape))


def input_bytes(shape: Shape) -> float:
    return 4.0 * shape.layers * sum(n * n for n in inputs_of(shape))


def flops_of_token(shape: Shape) -> float:
    """Forward, the backward to the inputs, gradients of the weights, and folded Grams."""
    products = 6.0 * shape.layers * sum(out * inner for out, inner in layers_of(shape))
    return products + 2 * 0.625 * shape.layers * sum(n * n for n in inputs_of(shape))


def powers(shape: Shape, power: int) -> float:
    """What factorizations (3) or products with thin matrices (2) of all layers grow with."""
    return float(shape.layers * sum(inner**power for _, inner in layers_of(shape)))


def constants(records: Records) -> dict[str, float]:
    """What the larger table is made of, each from the records."""
    one = [
        r
        for r in records
        if r.get("processes") == 1 and r.get("kind") == "plain" and r["batch"] == 8
    ]
    few, many = sorted(one, key=lambda r: r["sequences"])[:: len(one) - 1]
    tokens = (many["sequences"] - few["sequences"]) * few["tokens"]
    shape = SHAPES[few["shape"]]
    slope = (seconds_of_pass(many) - seconds_of_pass(few)) / tokens
    start = find(records, 1, "plain")
    links = next(r for r in records if r.get("name") == "links" and r["processes"] == 2)
    two = find(records, 2, "plain")
    travels = gradient_bytes(shape) + TRIANGLE * input_bytes(shape)
    return {
        "flops": flops_of_token(shape) / slope,
        # Half of a buffer leaves each of two cards.
        "link": links["reduce_scatter 1024 MiB, GB/s"] * 1e9 / 2,
        "reduction": travels / 2 / two["seconds"]["reduce_layers"],
        "solve": start["seconds"]["solve_layers"],
        "square": powers(shape, 2),
        "cube": powers(shape, 3),
    }


def large(records: Records) -> str:
    """LoRA-DA at 70B, by number of cards."""
    known = constants(records)
    gradients, inputs = gradient_bytes(LARGE), input_bytes(LARGE)
    travels, held = gradients + TRIANGLE * inputs, gradients + inputs
    weights = gradients / 2
    passes = -(-held // ROOM)
    token = flops_of_token(LARGE) / known["flops"]
    solve = [known["solve"] * powers(LARGE, n) / known[k] for n, k in ((2, "square"), (3, "cube"))]
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, values: Sequence[str]) -> None:
        rows.append((name, list(values)))

    shares = [(p - 1) / p for p in CARDS]
    link = [known["link"] if p <= 8 else BETWEEN_HOSTS for p in CARDS]
    whole = [known["reduction"] if p <= 8 else BETWEEN_HOSTS for p in CARDS]
    row("sums held by a card after the passes", [f"{held / p / 1e9:.3g} GB" for p in CARDS])
    row("each card sends, and receives, once", [f"{travels * s / 1e9:.0f} GB" for s in shares])
    row(
        "messages (reduce-scatters) of it",
        [f"{travels / max(2**28, p * 2**21):.0f}" for p in CARDS],
    )
    row(
        "the same, seconds at the links' rate",
        _times(travels * s / b for s, b in zip(shares, link, strict=True)),
    )
    row(
        "at the rate of the whole reduction",
        _times(travels * s / b for s, b in zip(shares, whole, strict=True)),
    )
    sequences = [max(1, SAMPLE[0] // p) for p in CARDS]
    one_pass = [n * SAMPLE[1] * token for n in sequences]
    row("compute of one pass", _times(one_pass))
    batches = [-(-n // 8) for n in sequences]
    row(
        "weights gathered in it, twice a batch of 8",
        _times(2 * n * weights * s / b for n, s, b in zip(batches, shares, link, strict=True)),
    )
    row(
        f"{passes:.0f} passes, the larger of both",
        _times(
            passes * max(c, 2 * n * weights * s / b)
            for c, n, s, b in zip(one_pass, batches, shares, link, strict=True)
        ),
    )
    # No layer is solved by two cards.
    largest = [s * LARGE.inner**n / powers(LARGE, n) for s, n in zip(solve, (2, 3), strict=True)]
    least, most = ([max(s / p, one) for p in CARDS] for s, one in zip(solve, largest, strict=True))
    row("solves", [f"{a:.2g} to {b:.2g} s" for a, b in zip(least, most, strict=True)])
    head = "| | " + " | ".join(f"{p} cards" for p in CARDS) + " |"
    lines = [head, "|---|" + "---|" * len(CARDS)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(values)} |" for name, values in rows)])


def _times(values: Any) -> list[str]:
    return [f"{value:.2g} s" if value < 100 else f"{value:.0f} s" for value in values]
