"""Task texts as fixed-length token arrays: made once, then read without a tokenizer.

``python -m benchmarks.quality.data`` writes one compressed file a task to the cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.cache import cache_folder
from benchmarks.common.tasks import Example, Style

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

OTHER = {task: "letter_counting" for task in TASKS + FRESH} | {
    "letter_counting": "simple_equations"
}
"""What is looked at after fine-tuning on a task, to see what was forgotten."""

SIZES = {"train": 6144, "validation": 512, "test": 1024}


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
        from benchmarks.quality.labelled import load_labelled

        return load_labelled(path)
    with np.load(path) as file:
        slots = int(file["slots"])
        pools = {split: pool_of(*_arrays(file, split), slots) for split in SIZES}
    other = folder / f"{OTHER.get(task, task)}.npz"
    if task in OTHER and other.exists():
        with np.load(other) as file:
            pools["other"] = fitting(_arrays(file, "validation"), pools["train"])
    return pools


def style_of(task: str, folder: Path) -> str:
    """The prompt's style in a prepared file."""
    with np.load(folder / f"{task}.npz") as file:
        return str(file["style"]) if "style" in file else "plain"


def fitting(arrays: Sequence[Tensor], like: Pool, most: int = 128) -> Pool:
    """The first sequences of another task that a pool's length and label slots have room for."""
    tokens, lengths, prompts = arrays
    width, slots = like.tokens.shape[1], like.targets.shape[1]
    rows = ((lengths <= width) & (lengths - prompts <= slots)).nonzero()[:most, 0]
    held = tokens.new_zeros(len(rows), width)
    common = min(width, tokens.shape[1])
    held[:, :common] = tokens[rows, :common]
    return pool_of(held, lengths[rows], prompts[rows], slots)


def _arrays(file: Any, split: str) -> list[Tensor]:
    return [torch.from_numpy(file[f"{split}_{k}"].astype(np.int64)) for k in _KEYS]


_KEYS = ("tokens", "lengths", "prompts")


def prepare(task: str, folder: Path, style: Style = "plain") -> Path:
    """Generate, tokenize and store a task, unless its file is there.

    The one percent of sequences that are longest are passed over: one fixed length serves all.
    """
    path = folder / f"{task}.npz"
    if path.exists():
        return path
    if task not in TASKS + FRESH:
        from benchmarks.quality.labelled import prepare_labelled

        return prepare_labelled(task, folder)
    from benchmarks.common.models import load_smollm2_tokenizer
    from benchmarks.common.tasks import check_disjoint, make_examples, make_split

    tokenizer = load_smollm2_tokenizer()
    sample = make_examples(task, "train", 512, tokenizer=tokenizer, style=style)
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
        )
        for name, size in SIZES.items()
    }
    check_disjoint(**{name: make_split(task, name, size) for name, size in SIZES.items()})  # type: ignore[arg-type]
    everything = [e for examples in splits.values() for e in examples]
    arrays: dict[str, np.ndarray] = {
        "slots": np.array(max(len(e) - e.prompt_length for e in everything)),
        "style": np.array(style),
    }
    for name, examples in splits.items():
        tokens = np.full((len(examples), limit), tokenizer.pad_token_id, dtype=np.uint16)
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = example.input_ids
        arrays[f"{name}_tokens"] = tokens
        arrays[f"{name}_lengths"] = np.array([len(e) for e in examples], dtype=np.uint16)
        arrays[f"{name}_prompts"] = np.array([e.prompt_length for e in examples], dtype=np.uint16)
    store(path, arrays)
    return path


def store(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed file of arrays aside, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(scratch, path)


def training_rows(pool_size: int, samples: int, seed: int) -> Tensor:
    """``(samples,)`` rows of the training pool that a seed fine-tunes on, in its first order."""
    if samples > pool_size:
        raise ValueError(f"{samples} training samples were asked for; the pool has {pool_size}")
    generator = torch.Generator().manual_seed(10_007 + seed)
    return torch.randperm(pool_size, generator=generator)[:samples]


def batch_order(pool_size: int, samples: int, seed: int, steps: int, batch_size: int) -> Tensor:
    """``(steps, batch)`` rows of the training pool, every epoch reshuffled."""
    rows = training_rows(pool_size, samples, seed)
    generator = torch.Generator().manual_seed(20_011 + seed)
    parts, have = [rows], samples
    while have < steps * batch_size:
        parts.append(rows[torch.randperm(samples, generator=generator)])
        have += samples
    return torch.cat(parts)[: steps * batch_size].reshape(steps, batch_size)


def default_folder() -> Path:
    return cache_folder() / "quality"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=Path, default=default_folder())
    parser.add_argument("--style", choices=("plain", "chat"), default="plain", help="of the prompt")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        path = prepare(task, arguments.out, arguments.style)
        pools = load_pools(task, arguments.out)
        shape = tuple(pools["train"].tokens.shape)
        slots = pools["train"].targets.shape[1]
        size = path.stat().st_size / 1e6
        print(f"{task}: train {shape}, {slots} label slots, {size:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
