"""What the demo shows at its end: a table, a picture of the curves, and one JSON file."""

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


def write_json(path: Path, settings: Settings, base: Result, results: list[Result]) -> None:
    """All results with their provenance, written aside and renamed."""
    document = {
        "settings": asdict(settings),
        "provenance": provenance(),
        "base": base,
        "methods": results,
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def table(base: Result, results: list[Result]) -> str:
    """The base and every method, one line each, in Markdown that also reads well in a terminal."""
    head = ["", "loss before step 1", "final loss", "exact match", "init (s)", "training (s)"]
    start = base["held_out"][0]
    rows = [["base model", f"{start['loss']:.3f}", "", f"{start['exact_match']:.1%}", "", ""]]
    for result in results:
        first, last = result["held_out"][0], result["held_out"][-1]
        rows.append(
            [
                result["label"],
                f"{first['loss']:.3f}",
                f"{last['loss']:.3f}",
                f"{last['exact_match']:.1%}",
                f"{result['init_seconds']:.1f}",
                f"{result['train_seconds']:.1f}",
            ]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [_line(head, widths), _line(["-" * w for w in widths], widths)]
    return "\n".join(lines + [_line(row, widths) for row in rows])


def plot(path: Path, settings: Settings, results: list[Result], known: dict[str, Entry]) -> None:
    """Held-out loss (marked points), the training loss behind it, and exact match."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "axes.labelcolor": "#374151",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "grid.linewidth": 0.7,
        "xtick.color": "#6b7280",
        "ytick.color": "#6b7280",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 4.0), width_ratios=(1.7, 1), layout="constrained"
        )
        for result in results:
            color = known[result["method"]].color
            _curves(left, right, result, color)
        left.set(xlabel="optimizer step", ylabel="loss per answer token")
        left.set_title("Loss: held-out (line), training (faint)")
        left.set_ylim(bottom=0)
        left.margins(x=0.02)
        left.legend(loc="upper right")
        right.set(xlabel="optimizer step", ylabel="answers exactly right")
        right.set_title("Held-out exact match")
        right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        right.set_ylim(bottom=0)
        figure.suptitle(
            f"SmolLM2-135M on {settings.task}: rank {settings.rank}, {settings.steps} steps of "
            f"{settings.batch_size} problems, one learning rate, one seed",
            x=0.01,
            ha="left",
            color="#111827",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        plt.close(figure)


def _curves(left: Any, right: Any, result: Result, color: str) -> None:
    steps = [point["step"] for point in result["held_out"]]
    losses = [point["loss"] for point in result["held_out"]]
    exact = [point["exact_match"] for point in result["held_out"]]
    train = result["train_loss"]
    # The loss logged at step k was measured before its update, so it stands at k - 1.
    left.plot(range(len(train)), train, color=color, alpha=0.22, linewidth=1)
    marks = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    left.plot(steps, losses, color=color, linewidth=2, label=result["label"], **marks)
    right.plot(steps, exact, color=color, linewidth=2, **marks)


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
