"""The picture of recorded results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.cache import REPOSITORY
from benchmarks.speed.tables import Record, by_name, grown, longer, pass_seconds

PICTURE = REPOSITORY / "docs" / "images" / "speed.png"

BARS = ("LoRA-DA", "full Sy", "floor, 64 x 256", "LoRA-DA, 64 x 256")


def picture(records: Sequence[Record], path: Path = PICTURE) -> None:
    """Where a start's seconds go beside the floor; growth with width, rank and blocks: what is recorded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = by_name(records)
    panels: list[Callable[[Any, Mapping[str, Record]], None]] = []
    if any(name in known for name in BARS):
        panels.append(parts)
    if grown(known):
        panels.append(widths)
    if "ranks" in known:
        panels.append(ranks)
    if longer(known):
        panels.append(blocks)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.6), constrained_layout=True, squeeze=False
    )
    for panel, place in zip(panels, axes[0], strict=True):
        panel(place, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parts(place: Any, known: Mapping[str, Record]) -> None:
    """Seconds of a start's parts, beside the floor's."""
    bars = [n for n in ("floor", *BARS) if n in known]
    below = [0.0] * len(bars)
    for part in ("floor", "pass", "solve", "install"):
        heights = [
            (pass_seconds(known[n]) or 0.0)
            if part == "pass"
            else known[n]["seconds"].get(part, 0.0)
            for n in bars
        ]
        if max(heights, default=0.0) < 0.1:
            continue  # too thin to be seen
        place.barh(bars, heights, left=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    place.invert_yaxis()
    place.set_xlabel("seconds")
    if place.patches:
        place.legend(frameon=False)
    place.set_title("7B shape, r = 8")


def widths(place: Any, known: Mapping[str, Record]) -> None:
    """One decoder layer, by its width."""
    layers = grown(known)
    numbers = [width for width, *_ in layers]
    last = layers[-1][2]["seconds"]["solve"]
    cubic = [last * (w / numbers[-1]) ** 3 for w in numbers]
    place.loglog(numbers, cubic, ":", color="gray", label="cubic")
    _lines(place, layers)
    place.set_xlabel("width of one decoder layer")
    place.set_title("growth with width")
    place.legend(frameon=False)


def blocks(place: Any, known: Mapping[str, Record]) -> None:
    """A model block by block, by the number of its blocks."""
    _lines(place, longer(known))
    place.set_xlabel("blocks of a 7B shape, one by one")
    place.set_title("growth with blocks, LoRA-DA in a budget")
    place.legend(frameon=False)


def _lines(place: Any, entries: Sequence[tuple[int, Record, Record]]) -> None:
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    numbers = [number for number, *_ in entries]
    place.loglog(numbers, [low["seconds"]["floor"] for _, low, _ in entries], "o-", label="floor")
    place.loglog(numbers, [pass_seconds(r) for *_, r in entries], "o-", label="pass")
    place.loglog(numbers, [r["seconds"]["solve"] for *_, r in entries], "o-", label="solve")
    place.set_xticks(numbers, [str(number) for number in numbers])
    place.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    place.set_ylabel("seconds")
    place.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    place.yaxis.set_minor_formatter(NullFormatter())


def ranks(place: Any, known: Mapping[str, Record]) -> None:
    """Solves of one decoder layer, by the rank."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    for name, title in (("lora_da", "LoRA-DA"), ("filet", "FILet"), ("natural", "Natural")):
        points = [
            (rank, known["ranks"]["seconds"][f"{name} {rank}"])
            for rank in known["ranks"]["options"]["ranks"]
            if f"{name} {rank}" in known["ranks"]["seconds"]
        ]
        place.loglog(*zip(*points, strict=True), "o-", label=title)
    numbers = sorted({rank for line in place.lines for rank in line.get_xdata()})
    place.set_xticks(numbers, [f"{rank:g}" for rank in numbers])
    place.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    place.set_xlabel("rank")
    place.set_ylabel("seconds")
    place.set_title("solves, one decoder layer")
    place.legend(frameon=False)
    place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    place.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    place.yaxis.set_minor_formatter(NullFormatter())
