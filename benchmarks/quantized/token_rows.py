"""Rows of text and of tasks as tokens of one model, in one small file that is read without a tokenizer.

``python -m benchmarks.quantized.write_rows`` makes it. Text is Python's own manual (``pydoc_data``). Tasks of
language models are prompts with one right answer (``benchmarks.common.tasks``), those of an encoder rated
sentences with a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.tasks import make_examples
from benchmarks.quality.data.classification import TextPool, load_labelled, prepare_labelled
from benchmarks.quality.data.pools import Pool, pool_of, store

TEXT = "text"

HEAD_ROWS = 1024
"""Of a task with classes, rows beside the others, that its head is fitted on."""

HEAD = "+head"
"""Ends the name of those rows."""


def manual() -> str:
    """The reference part of Python's manual, in one piece."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def evenly(count: int, wanted: int) -> Tensor:
    """So many indices from all of ``0 ... count - 1``. Raises ``ValueError`` where there are too few."""
    if wanted > count:
        raise ValueError(
            f"{wanted} rows were asked for and {count} are there: write a file of more"
        )
    return torch.linspace(0, count - 1, wanted).long()


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the model wants before and after a text, if any."""
    around = tokenizer("")["input_ids"]
    return list(around[:1]), list(around[1:])


def text_rows(tokenizer: Any, rows: int, length: int) -> Tensor:
    """``(rows, length)`` tokens of the manual, evenly from all of it, each row in the model's `frame`."""
    before, after = frame(tokenizer)
    tokens = tokenizer(manual(), add_special_tokens=False, verbose=False)["input_ids"]
    width = length - len(before) - len(after)
    whole = torch.tensor(tokens[: len(tokens) // width * width]).reshape(-1, width)
    first, last = (torch.tensor(end).long().expand(rows, len(end)) for end in (before, after))
    return torch.cat([first, whole[evenly(len(whole), rows)], last], dim=1)


def language_rows(tokenizer: Any, tasks: Sequence[str], rows: int, length: int) -> dict[str, Pool]:
    """By data set: text with every token labelled, and tasks with their answers labelled."""
    text = text_rows(tokenizer, rows, length)
    whole = torch.full((rows,), length)
    pools = {TEXT: pool_of(text, whole, torch.ones_like(whole), length - 1)}
    before, _ = frame(tokenizer)
    for task in tasks:
        examples = make_examples(task, "train", rows, tokenizer=tokenizer)
        lengths = torch.tensor([len(before) + len(e) for e in examples])
        prompts = torch.tensor([len(before) + e.prompt_length for e in examples])
        tokens = torch.full((rows, int(lengths.max())), tokenizer.pad_token_id)
        for row, example in enumerate(examples):
            tokens[row, : lengths[row]] = torch.tensor([*before, *example.input_ids])
        pools[task] = pool_of(tokens, lengths, prompts, int((lengths - prompts).max()))
    return pools


def encoder_rows(
    tokenizer: Any, tasks: Sequence[str], rows: int, length: int, folder: Path
) -> dict[str, Pool]:
    """By data set: text without a class (0), sentences with theirs, and those for the heads."""
    text = text_rows(tokenizer, rows, length)
    pools = {TEXT: class_pool(text, torch.full((rows,), length), torch.zeros(rows).long())}
    for task in tasks:
        path = folder / f"{task}.npz"
        whole = load_labelled(path if path.exists() else prepare_labelled(task, folder))["train"]
        pools[task] = whole.first(rows)
        after = torch.arange(rows, min(len(whole), rows + HEAD_ROWS))
        pools[task + HEAD] = class_pool(
            whole.tokens[after], whole.lengths[after], whole.targets[after, 0]
        )
    return pools


def class_pool(tokens: Tensor, lengths: Tensor, classes: Tensor) -> TextPool:
    """Right-padded sentences ``(n, length)`` with one class each."""
    targets = classes[:, None]
    return TextPool(
        tokens, lengths, torch.zeros_like(targets), targets, torch.ones_like(targets).float()
    )


def write(pools: Mapping[str, Pool], path: Path) -> None:
    """All data sets in one compressed file, written aside and renamed."""
    arrays = {}
    for name, pool in pools.items():
        small = np.uint16 if int(pool.tokens.max()) < 2**16 else np.uint32
        arrays[f"{name}.tokens"] = pool.tokens.numpy().astype(small)
        arrays[f"{name}.lengths"] = pool.lengths.numpy().astype(np.uint16)
        if isinstance(pool, TextPool):
            arrays[f"{name}.classes"] = pool.targets[:, 0].numpy().astype(np.uint8)
        else:
            prompts = pool.lengths - (pool.weights > 0).sum(1)
            arrays[f"{name}.prompts"] = prompts.numpy().astype(np.uint16)
    store(path, arrays)


def read(path: Path) -> dict[str, Pool]:
    """What `write` wrote, by data set."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files}
    pools: dict[str, Pool] = {}
    for name in (key.removesuffix(".tokens") for key in arrays if key.endswith(".tokens")):
        tokens, lengths = arrays[f"{name}.tokens"], arrays[f"{name}.lengths"]
        if f"{name}.classes" in arrays:
            pools[name] = class_pool(tokens, lengths, arrays[f"{name}.classes"])
        else:
            prompts = arrays[f"{name}.prompts"]
            pools[name] = pool_of(tokens, lengths, prompts, int((lengths - prompts).max()))
    return pools


def divided(pool: Pool, rows: int, held_out: int, size: int) -> tuple[list[Any], list[Any]]:
    """Batches for the statistics and batches to measure on, both from all of the pool.

    Every so many rows one is held out, so that both are of the same kind.
    """
    picked = evenly(len(pool), rows + held_out).tolist()
    every = (rows + held_out) // held_out
    held = picked[every - 1 :: every][:held_out]
    kept = set(held)
    return (
        pool.batches([row for row in picked if row not in kept], size),
        pool.batches(held, size),
    )
