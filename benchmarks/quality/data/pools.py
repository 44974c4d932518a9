"""Sequences of one length and where their labels stand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.tasks import Example


@dataclass(frozen=True, eq=False)
class Pool:
    """Right-padded sequences and where their labels stand.

    Attributes:
        tokens: ``(n, length)`` int64.
        lengths: ``(n,)`` tokens that are not padding.
        positions: ``(n, slots)``: the position whose logits predict the slot's target.
        targets: ``(n, slots)`` tokens to predict.
        weights: ``(n, slots)`` one where the slot is used, else zero.
    """

    tokens: Tensor
    lengths: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Positions that a model sees in one row."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str) -> Pool:
        return type(self)(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def first(self, count: int) -> Pool:
        return type(self)(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))

    def batches(self, rows: Sequence[int], batch_size: int) -> list[dict[str, Tensor]]:
        """Keyword batches with mask and labels, each padded to its own longest sequence."""
        found = []
        for start in range(0, len(rows), batch_size):
            pick = torch.as_tensor(rows[start : start + batch_size], device=self.tokens.device)
            lengths, tokens = self.lengths[pick], self.tokens[pick]
            longest = int(lengths.max())
            labels = torch.full_like(tokens, -100)
            used = self.weights[pick] > 0
            row = torch.arange(len(pick), device=tokens.device)[:, None].expand_as(used)
            labels[row[used], self.positions[pick][used] + 1] = self.targets[pick][used]
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
            found.append(
                {
                    "input_ids": tokens[:, :longest],
                    "attention_mask": mask[:, :longest].long(),
                    "labels": labels[:, :longest],
                }
            )
        return found


def pool_of(tokens: Tensor, lengths: Tensor, prompts: Tensor, slots: int) -> Pool:
    """A pool from padded tokens, sequence lengths and prompt lengths."""
    slot = torch.arange(slots)
    counts = (lengths - prompts)[:, None]
    used = slot < counts
    positions = (prompts[:, None] - 1 + slot).clamp(max=tokens.shape[1] - 2)
    targets = tokens.gather(1, positions + 1)
    zero = torch.zeros_like(positions)
    return Pool(
        tokens,
        lengths,
        torch.where(used, positions, zero),
        torch.where(used, targets, zero),
        used.float(),
    )


def pools_from_examples(
    splits: dict[str, list[Example]], pad: int, *, multiple: int = 8
) -> dict[str, Pool]:
    """All splits at one length and one number of label slots."""
    everything = [e for examples in splits.values() for e in examples]
    length = -(-max(map(len, everything)) // multiple) * multiple
    slots = max(len(e) - e.prompt_length for e in everything)
    pools = {}
    for name, examples in splits.items():
        tokens = torch.full((len(examples), length), pad, dtype=torch.long)
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = torch.tensor(example.input_ids)
        lengths = torch.tensor([len(e) for e in examples])
        prompts = torch.tensor([e.prompt_length for e in examples])
        pools[name] = pool_of(tokens, lengths, prompts, slots)
    return pools


def fitting(arrays: Sequence[Tensor], like: Pool, most: int = 128) -> Pool:
    """The first sequences of another task that a pool's length and label slots have room for."""
    tokens, lengths, prompts = arrays
    width, slots = like.tokens.shape[1], like.targets.shape[1]
    rows = ((lengths <= width) & (lengths - prompts <= slots)).nonzero()[:most, 0]
    held = tokens.new_zeros(len(rows), width)
    common = min(width, tokens.shape[1])
    held[:, :common] = tokens[rows, :common]
    return pool_of(held, lengths[rows], prompts[rows], slots)


def store(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed file of arrays aside, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(scratch, path)
