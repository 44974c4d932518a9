"""Reasoning tasks as token arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.models import load_gemma_tokenizer, load_smollm2_tokenizer
from benchmarks.common.tasks import CANDIDATES, Style, check_disjoint, make_examples, make_split
from benchmarks.quality.data.pools import Pool, fitting, pool_of, store

TASKS: tuple[str, ...] = (
    "chain_sum",
    "family_relationships",
    "letter_counting",
    "simple_equations",
    "calendar_arithmetic",
    "gsm_symbolic",
)
"""The reasoning tasks of the benchmark, the one with the longest sequences last."""

FRESH: tuple[str, ...] = ("syllogism", "word_sorting", "spell_backward")
"""Tasks that no choice was made on: what was decided on `TASKS` is tried on these."""

KNOWN: tuple[str, ...] = tuple(dict.fromkeys(TASKS + FRESH + CANDIDATES))
"""Every reasoning task that can be prepared."""

OTHER = {task: "letter_counting" for task in KNOWN} | {"letter_counting": "simple_equations"}
"""What is looked at after fine-tuning on a task, to see what was forgotten."""

SIZES = {"train": 6144, "validation": 512, "test": 1024}


@dataclass(frozen=True)
class Words:
    """How a language model's texts become tokens.

    Attributes:
        load: its tokenizer.
        styles: of the prompts that it is given.
        begin: whether a text begins with the tokenizer's first token.
    """

    load: Callable[[], Any]
    styles: tuple[Style, ...]
    begin: bool


DEFAULT = "smollm2-135m-instruct"

WORDS: dict[str, Words] = {
    DEFAULT: Words(lambda: load_smollm2_tokenizer(), ("plain", "chat"), begin=False),
    # A base model: it has seen no chat turns, and no text without the first token.
    "gemma-3-270m": Words(lambda: load_gemma_tokenizer(), ("plain",), begin=True),
}
"""By the name of the model. Data files name the one that they are for; files without a name are the
`DEFAULT` model's."""


def model_of_arrays(file: Any) -> str:
    """The model that an open file of a reasoning task is for."""
    return str(file["model"]) if "model" in file else DEFAULT


def load_reasoning(task: str, folder: Path) -> dict[str, Pool]:
    """The splits of a reasoning task; ``"other"`` if the other task is prepared too and fits its shapes.

    Raises:
        ValueError: the two are tokens of different models.
    """
    with np.load(folder / f"{task}.npz") as file:
        slots = int(file["slots"])
        pools = {split: pool_of(*_arrays(file, split), slots) for split in SIZES}
        model = model_of_arrays(file)
    other = folder / f"{OTHER.get(task, task)}.npz"
    if task in OTHER and other.exists():
        with np.load(other) as file:
            if model_of_arrays(file) != model:
                raise ValueError(
                    f"{other} has tokens of {model_of_arrays(file)}, {task}.npz beside it of {model}: "
                    "give every model a folder of its own"
                )
            held = fitting(_arrays(file, "validation"), pools["train"])
            if len(held):
                pools["other"] = held
    return pools


def _arrays(file: Any, split: str) -> list[Tensor]:
    return [torch.from_numpy(file[f"{split}_{k}"].astype(np.int64)) for k in _KEYS]


_KEYS = ("tokens", "lengths", "prompts")


def prepare_reasoning(
    task: str, folder: Path, style: Style = "plain", model: str = DEFAULT
) -> Path:
    """The one percent of sequences that are longest are passed over: one fixed length serves all.

    Raises:
        ValueError: the model is not given prompts of this style.
    """
    path, words = folder / f"{task}.npz", WORDS[model]
    if style not in words.styles:
        raise ValueError(f"prompts for {model} are {' or '.join(words.styles)}, not {style}")
    tokenizer, begin = words.load(), words.begin
    sample = make_examples(task, "train", 512, tokenizer=tokenizer, style=style, begin=begin)
    limit = sorted(map(len, sample))[int(0.99 * len(sample))]
    limit = -(-limit // 8) * 8
    splits = {
        name: make_examples(
            task,
            name,  # type: ignore[arg-type]
            size,
            tokenizer=tokenizer,
            max_length=limit,
            style=style,
            begin=begin,
        )
        for name, size in SIZES.items()
    }
    check_disjoint(**{name: make_split(task, name, size) for name, size in SIZES.items()})  # type: ignore[arg-type]
    everything = [e for examples in splits.values() for e in examples]
    arrays: dict[str, np.ndarray] = {
        "slots": np.array(max(len(e) - e.prompt_length for e in everything)),
        "style": np.array(style),
        "model": np.array(model),
    }
    largest = max(max(e.input_ids) for e in everything)
    narrow = np.uint16 if largest < 2**16 else np.uint32
    for name, examples in splits.items():
        tokens = np.full((len(examples), limit), tokenizer.pad_token_id, dtype=narrow)
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = example.input_ids
        arrays[f"{name}_tokens"] = tokens
        arrays[f"{name}_lengths"] = np.array([len(e) for e in examples], dtype=np.uint16)
        arrays[f"{name}_prompts"] = np.array([e.prompt_length for e in examples], dtype=np.uint16)
    store(path, arrays)
    return path
