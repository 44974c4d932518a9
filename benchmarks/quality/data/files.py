"""Prepared files: one a task, made once, then read without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common.cache import cache_folder
from benchmarks.common.tasks import Style
from benchmarks.quality.data.classification import load_labelled, prepare_labelled
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.data.reasoning import KNOWN, load_reasoning, prepare_reasoning


def load_pools(task: str, folder: Path) -> dict[str, Pool]:
    """The splits of a task from its prepared file; ``"other"`` holds sequences of another task."""
    path = folder / f"{task}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: make it with `python -m benchmarks.quality.data --out {folder}`"
        )
    with np.load(path) as file:
        labelled = "kind" in file
    if labelled:
        return load_labelled(path)
    return load_reasoning(task, folder)


def style_of(task: str, folder: Path) -> str:
    """The prompt's style in a prepared file."""
    with np.load(folder / f"{task}.npz") as file:
        return str(file["style"]) if "style" in file else "plain"


def prepare(task: str, folder: Path, style: Style = "plain") -> Path:
    """Generate, tokenize and store a task, unless its file is there."""
    path = folder / f"{task}.npz"
    if path.exists():
        return path
    if task not in KNOWN:
        return prepare_labelled(task, folder)
    return prepare_reasoning(task, folder, style)


def default_folder() -> Path:
    return cache_folder() / "quality"
