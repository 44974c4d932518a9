"""The picture of recorded results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.cache import REPOSITORY
from benchmarks.speed.tables import Record, by_name, grown, longer, pass_seconds

PICTURE = REPOSITORY / "docs" / "images" / "speed.png"


def picture(records: Sequence[Record], path: Path = PICTURE) -> None:
    """Where a start's seconds go beside the floor; growth with width, with blocks and with rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    known = by_name(records)
    figure, ((left, middle), (lower, right)) = pyplot.subplots(
        2, 2, figsize=(9, 7), constrained_layout=True
    )
    bars = [
        n
        for n in ("floor", "LoRA-DA", "full Sy", "floor, 64 x 256", "LoRA-DA, 64 x 256")
        if n in known
    ]
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
        left.barh(bars, heights, left=below, label=part)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    left.invert_yaxis()
    left.set_xlabel("seconds")
    left.legend(frameon=False)
    left.set_title("7B shape, r = 8")
    layers = grown(known)
    if layers:
        widths = [width for width, *_ in layers]
        middle.loglog(
            widths, [low["seconds"]["floor"] for _, low, _ in layers], "o-", label="floor"
        )
        middle.loglog(widths, [pass_seconds(r) for *_, r in layers], "o-", label="pass")
        middle.loglog(widths, [r["seconds"]["solve"] for *_, r in layers], "o-", label="solve")
        last = layers[-1][2]["seconds"]["solve"]
        middle.loglog(
            widths, [last * (w / widths[-1]) ** 3 for w in widths], ":", color="gray", label="cubic"
        )
        middle.set_xlabel("width of one decoder layer")
        middle.set_xticks(widths, [str(width) for width in widths])
        middle.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        middle.set_ylabel("seconds")
        middle.set_title("growth with width")
        middle.legend(frameon=False)
        middle.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    blocks = longer(known)
    if blocks:
        numbers = [number for number, *_ in blocks]
        lower.loglog(
            numbers, [low["seconds"]["floor"] for _, low, _ in blocks], "o-", label="floor"
        )
        lower.loglog(numbers, [pass_seconds(r) for *_, r in blocks], "o-", label="pass")
        lower.loglog(numbers, [r["seconds"]["solve"] for *_, r in blocks], "o-", label="solve")
        lower.set_xticks(numbers, [str(number) for number in numbers])
        lower.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        lower.set_xlabel("blocks of a 7B shape, one by one")
        lower.set_ylabel("seconds")
        lower.set_title("growth with blocks, within a budget")
        lower.legend(frameon=False)
        lower.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    if "ranks" in known:
        for name, title in (("lora_da", "LoRA-DA"), ("filet", "FILet"), ("natural", "Natural")):
            points = [
                (rank, known["ranks"]["seconds"][f"{name} {rank}"])
                for rank in known["ranks"]["options"]["ranks"]
                if f"{name} {rank}" in known["ranks"]["seconds"]
            ]
            right.loglog(*zip(*points, strict=True), "o-", label=title)
        ranks = sorted({rank for line in right.lines for rank in line.get_xdata()})
        right.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
        right.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        right.set_xlabel("rank")
        right.set_ylabel("seconds")
        right.set_title("solves, one decoder layer")
        right.legend(frameon=False)
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        right.yaxis.set_minor_formatter(NullFormatter())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
