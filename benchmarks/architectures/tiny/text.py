"""Rows of tokens, of other lengths, with the labels that a family wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator

Row = dict[str, Any]
LENGTHS = (9, 7, 6, 8, 9, 5, 7, 6)
FIRST, LAST = 12, 90
"""Token ids between those that mean something and the vocabulary's end."""


def tokens(generator: Generator, length: int, last: int = LAST) -> torch.Tensor:
    """``(1, length)`` ids."""
    return torch.randint(min(FIRST, last - 1), last, (1, length), generator=generator)


def text_rows(
    family: str,
    name: str,
    config: Any,
    arguments: tuple[str, ...],
    generator: Generator,
    classes: int,
) -> list[Row]:
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = tokens(generator, length)
        row: Row = {"input_ids": ids}
        if "attention_mask" in arguments:
            row["attention_mask"] = torch.ones_like(ids)
        if family == "CAUSAL_LM":
            row["labels"] = ids.clone()
            row["labels"][:, : i % 3] = -100
        elif family in ("MASKED_LM", "TOKEN_CLASSIFICATION"):
            most = classes if family == "TOKEN_CLASSIFICATION" else LAST
            row["labels"] = torch.randint(0, most, (1, length), generator=generator)
            row["labels"][:, i % 3] = -100
        elif family == "SEQUENCE_CLASSIFICATION":
            row["labels"] = torch.tensor([i % classes])
            if config.is_encoder_decoder:
                # They read the state at the end token.
                ids[:, -1] = 2
        elif family == "QUESTION_ANSWERING":
            row["start_positions"] = torch.tensor([1 + i % 2])
            row["end_positions"] = torch.tensor([3 + i % 2])
            if name == "longformer":
                # It finds the question by three separators.
                ids[:, [1, 2, -1]] = 2
        elif family == "SEQ_TO_SEQ_CAUSAL_LM":
            row["labels"] = ids.clone()
            if config.is_encoder_decoder:
                row["labels"] = tokens(generator, 3 + i % 4)
            if name == "fsmt":
                # It makes no decoder inputs of labels: the first one is the end token.
                start = torch.full((1, 1), 2)
                row["decoder_input_ids"] = torch.cat([start, row["labels"][:, :-1]], 1)
        rows.append(row)
    return rows
