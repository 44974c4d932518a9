"""What the demo shows at its end: a table, a picture, and one JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.cache import REPOSITORY
from benchmarks.common.figures import STYLE
from benchmarks.demo.settings import PACKAGES, Entry, Settings

Result = dict[str, Any]


def provenance() -> dict[str, object]:
    """Where and with what the numbers were made."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("lorainit", *PACKAGES)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(
    path: Path, settings: Settings, base: Result, four_bits: Result | None, results: list[Result]
) -> None:
    """All results with their provenance, written aside and renamed."""
    document = {
        "settings": asdict(settings),
        "provenance": provenance(),
        "base": base,
        "four_bits": four_bits,
        "methods": results,
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def table(settings: Settings, base: Result, four_bits: Result | None, results: list[Result]) -> str:
    """A line each, in Markdown that also reads well in a terminal."""
    inner = settings.scored_at[1:-1]
    head = ["", "loss before step 1", *(f"after step {step}" for step in inner)]
    head += ["at the end", "exact match", "start (s)", "training (s)"]
    between = [""] * (len(inner) + 1)
    start = base["held_out"][0]
    rows = [["no adapter", f"{start['loss']:.3f}", *between, f"{start['exact_match']:.1%}", "", ""]]
    for result in results:
        losses = [f"{point['loss']:.3f}" for point in result["held_out"]]
        last = result["held_out"][-1]
        seconds = [f"{result[name]:.0f}" for name in ("init_seconds", "train_seconds")]
        rows.append([result["label"], *losses, f"{last['exact_match']:.1%}", *seconds])
    if four_bits is not None:
        for label, end, took in (
            ("4-bit base, no adapter", "", ""),
            ("4-bit base, given back", "_given_back", f"{four_bits['init_seconds']:.0f}"),
        ):
            loss, exact = four_bits[f"loss{end}"], four_bits[f"exact_match{end}"]
            rows.append([label, f"{loss:.3f}", *between, f"{exact:.1%}", took, ""])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [_line(head, widths), _line(["-" * w for w in widths], widths)]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def plot(
    path: Path,
    settings: Settings,
    base: Result,
    four_bits: Result | None,
    results: list[Result],
    known: dict[str, Entry],
) -> None:
    """Held-out loss over the steps; beside it, what a 4-bit base loses and gets back untrained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 4.0), width_ratios=(1.5, 1), layout="constrained"
        )
        for result in results:
            steps = [point["step"] for point in result["held_out"]]
            losses = [point["loss"] for point in result["held_out"]]
            left.plot(
                steps, losses, label=result["label"], color=known[result["method"]].color,
                linewidth=2, marker="o", markersize=4.5, markeredgecolor="white",
            )  # fmt: skip
        left.set(xlabel="optimizer step", ylabel="held-out loss per answer token")
        left.set_title("Training, each line at its rate")
        left.legend(loc="upper right")
        full = base["held_out"][0]["loss"]
        bars = [("full\nprecision", full, "#9ca3af")]
        if four_bits is not None:
            bars += [
                ("4 bits", four_bits["loss"], "#4b5563"),
                ("4 bits,\ngiven back", four_bits["loss_given_back"], "#009e73"),
            ]
        names, heights, colors = zip(*bars, strict=True)
        drawn = right.bar(names, heights, color=colors, width=0.6)
        right.bar_label(drawn, fmt="%.2f", padding=2)
        right.set_ylim(0.8 * min(heights), 1.05 * max(heights))
        right.grid(visible=False, axis="x")
        right.set_title("Before any training (axis cut)")
        figure.suptitle(
            f"SmolLM2-135M on {settings.task}: rank {settings.rank}, {settings.steps} steps of "
            f"{settings.batch_size} problems, one seed",
            x=0.01,
            ha="left",
            color="#111827",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        plt.close(figure)


def _line(cells: list[str], widths: list[int]) -> str:
    first, *rest = (
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *rest]) + " |"


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
