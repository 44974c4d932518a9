"""Tiny models with a new head, and data that the head alone can learn something of."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from tests.statistics import models

Batch = dict[str, Tensor]


def rows(count: int = 60, seed: int = 1) -> Batch:
    """Of two lengths, right-padded; what the first token is decides the labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCABULARY, (count, 7), generator=generator)
    ids[:, 0] = torch.randint(3, 11, (count,), generator=generator)
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled(kind: str, count: int = 60, size: int = 8, seed: int = 1) -> list[Batch]:
    """Batches of ``classes``, ``labels`` (several), ``numbers``, ``tags`` or ``spans``; or ``noise``."""
    every = rows(count, seed)
    first, ids = every["input_ids"][:, 0], every["input_ids"]
    if kind == "classes":
        every["labels"] = first % 3
    elif kind == "noise":
        every["labels"] = torch.randint(3, (count,), generator=torch.Generator().manual_seed(9))
    elif kind == "labels":
        every["labels"] = torch.stack([first % 2, first % 3 == 0, first > 6], 1).double()
    elif kind == "numbers":
        every["labels"] = (first - 3).double() / 4
    elif kind == "tags":
        every["labels"] = (ids % 3).masked_fill(every["attention_mask"] == 0, -100)
    elif kind == "spans":
        every |= {"start_positions": first % 4, "end_positions": first % 3 + 3}
    return [{k: v[i : i + size] for k, v in every.items()} for i in range(0, count, size)]


HEADS = {
    "classes": ("SequenceClassification", "SEQ_CLS"),
    "noise": ("SequenceClassification", "SEQ_CLS"),
    "labels": ("SequenceClassification", "SEQ_CLS"),
    "numbers": ("SequenceClassification", "SEQ_CLS"),
    "tags": ("TokenClassification", "TOKEN_CLS"),
    "spans": ("QuestionAnswering", "QUESTION_ANS"),
}


def classifier(kind: str = "classes", dtype: torch.dtype = torch.float64) -> Any:
    """A tiny BERT whose head is drawn at random."""
    head, _ = HEADS[kind]
    outputs = {"numbers": 1, "spans": 2}.get(kind, 3)
    return models.bert(dtype, head=head, num_labels=outputs)


def config(kind: str = "classes", **changes: Any) -> LoraConfig:
    return LoraConfig(
        r=2, task_type=HEADS[kind][1], target_modules=["query", "value", "dense"], **changes
    )
