"""Prepared files: one a task, made once, then read without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.common.cache import cache_folder
from benchmarks.common.tasks import Style
from benchmarks.quality.data.classification import load_labelled, prepare_labelled
from benchmarks.quality.data.pools import Pool
from benchmarks.quality.data.reasoning import (
    DEFAULT,
    KNOWN,
    load_reasoning,
    model_of_arrays,
    prepare_reasoning,
)

_LABELLED = {"text": "all-minilm-l6-v2", "image": "vit-mnist"}
"""The models of tasks with labels, by the kind of their files."""


def load_pools(task: str, folder: Path, model: str | None = None) -> dict[str, Pool]:
    """The splits of a task from its prepared file; ``"other"`` holds sequences of another task.

    Args:
        task: its name.
        folder: of the file.
        model: that will read them, quantized (``NAME+GRID``) or not; None: not checked.

    Raises:
        FileNotFoundError: the task is not prepared.
        ValueError: its tokens are another model's.
    """
    path = folder / f"{task}.npz"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: make it with `python -m benchmarks.quality.data --out {folder}`"
        )
    found = model_of_data(task, folder)
    if model is not None and model.partition("+")[0] != found:
        raise ValueError(
            f"the data of {task} in {folder} are tokens of {found}, not of {model}: name a folder that "
            f"`python -m benchmarks.quality.data --model {model.partition('+')[0]}` has made"
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


def model_of_data(task: str, folder: Path) -> str:
    """The model whose tokens, or images, a prepared file holds."""
    with np.load(folder / f"{task}.npz") as file:
        return _LABELLED[str(file["kind"])] if "kind" in file else model_of_arrays(file)


def prepare(task: str, folder: Path, style: Style = "plain", model: str | None = None) -> Path:
    """Generate, tokenize and store a task, unless its file is there.

    Raises:
        ValueError: a file is there, but of another model or style.
    """
    path = folder / f"{task}.npz"
    if path.exists():
        found = (model_of_data(task, folder), style_of(task, folder))
        if task in KNOWN and found != (model or DEFAULT, style):
            raise ValueError(
                f"{path} is there already, for {found[0]} in the style '{found[1]}': name another folder"
            )
        return path
    if task not in KNOWN:
        return prepare_labelled(task, folder)
    return prepare_reasoning(task, folder, style, model or DEFAULT)


def default_folder(model: str = DEFAULT) -> Path:
    """Where a language model's prepared tasks are, in the cache; those with labels are at the `DEFAULT`'s."""
    return cache_folder() / ("quality" if model == DEFAULT else f"quality-{model}")
