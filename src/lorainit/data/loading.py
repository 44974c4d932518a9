"""Records as a loader of padded batches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorainit.data.chat import Tokenizer
from lorainit.data.encoding import Example, check_form, encode
from lorainit.data.records import read_records
from lorainit.errors import DataError
from lorainit.types import IGNORED


class Records(Dataset[Example]):
    """Records, encoded when they are asked for, in an order drawn from `seed` (None: as they are)."""

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_length: int = 1024,
        seed: int | None = None,
    ) -> None:
        # In the order of the file, before they are shuffled and before long work.
        for number, record in enumerate(records):
            with _named(number):
                check_form(record)
        self.order = list(range(len(records)))
        if seed is not None:
            random.Random(seed).shuffle(self.order)
        self.records = records
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        number = self.order[index]
        with _named(number):
            return encode(self.records[number], self.tokenizer, self.max_length)


@contextmanager
def _named(number: int) -> Iterator[None]:
    """A ``DataError`` inside names the record."""
    try:
        yield
    except DataError as error:
        raise DataError(f"record {number + 1}: {error}") from error


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Sequences padded on the right, as keyword arguments of a causal language model."""
    length = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), length), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def load_batches(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int | None = 0,
) -> DataLoader[Any]:
    """A file of JSON lines as a loader for `get_peft_model` and `collect_statistics`.

    Args:
        path: of the file.
        tokenizer: of the model; its chat template decides what of a chat is learned.
        batch_size: sequences a batch. Statistics do not depend on it.
        max_length: longer sequences are cut to so many tokens.
        seed: of the order in which records are taken, the same at every call; None: as they stand
            in the file.

    Returns:
        A loader of ``input_ids``, ``attention_mask`` and ``labels``, padded on the right; it knows
        its number of records, which LoRA-DA reads.
    """
    records = Records(read_records(path), tokenizer, max_length=max_length, seed=seed)
    return batches_of(records, batch_size)


def batches_of(records: Dataset[Example], batch_size: int) -> DataLoader[Any]:
    """A loader of padded batches over records, or a part of them."""
    source = records
    while not isinstance(source, Records):
        source = source.dataset  # type: ignore[attr-defined]
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def together(examples: list[Example]) -> dict[str, Tensor]:
        return collate(examples, pad or 0)

    return DataLoader(records, batch_size=batch_size, collate_fn=together)
