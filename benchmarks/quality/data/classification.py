"""Classification tasks as arrays: sentences by sentiment, digits under a shift.

Sentences: three sources of short texts with human ratings, positive or not. Images: a small vision
transformer is pretrained on half of 5,000 MNIST digits; the other half, turned or inverted, and
scikit-learn's smaller digits are what it is adapted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.models import load_minilm_tokenizer
from benchmarks.quality.data import sources
from benchmarks.quality.data.pools import Pool, store

SENTIMENT = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}
"""Task names, and the parts of the rated sentences that they read."""

SHIFTS = ("digits", "rotated", "inverted", "mirrored", "noisy", "moved", "faint")

FRESH = ("editorials", "mirrored", "noisy", "moved", "faint")
"""Tasks that no choice was made on: what was decided on the others is tried on these."""

OTHER = {"movies": "products", "products": "tweets", "tweets": "movies", "editorials": "movies"}
"""Another task for every sentiment task; that of the images is the digits as they were."""

TEXT_SIZES = {"validation": 512, "test": 1024}

IMAGE_SIZES = {"validation": 300, "test": 697}

OTHER_ROWS = 256


@dataclass(frozen=True, eq=False)
class LabelledPool(Pool):
    """One label a row: a single slot, whose target is the class; `positions` are not used."""

    def batches(self, rows: Sequence[int], batch_size: int) -> list[dict[str, Tensor]]:
        found = []
        for start in range(0, len(rows), batch_size):
            pick = torch.as_tensor(rows[start : start + batch_size], device=self.tokens.device)
            inputs = self.inputs(self.tokens[pick], self.lengths[pick])
            found.append(inputs | {"labels": self.targets[pick, 0]})
        return found

    def inputs(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class TextPool(LabelledPool):
    """Token ids, right-padded."""

    def inputs(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        longest = int(lengths.max())
        mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
        return {"input_ids": tokens[:, :longest], "attention_mask": mask.long()}


class ImagePool(LabelledPool):
    """Pixels of square grey images, 0 to 255, row by row."""

    @property
    def length(self) -> int:
        """Patches of 4 x 4 pixels, and one more position."""
        return self.tokens.shape[1] // 16 + 1

    def inputs(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        del lengths
        return {"pixel_values": pixels(tokens)}


def pixels(rows: Tensor) -> Tensor:
    """``(n, side²)`` grey values to ``(n, 1, side, side)`` from -1 to 1."""
    side = round(rows.shape[1] ** 0.5)
    return rows.float().view(-1, 1, side, side) / 127.5 - 1


def load_labelled(path: Path) -> dict[str, Pool]:
    """The splits of a prepared file: train, validation, test, and other."""
    with np.load(path) as file:
        kind = ImagePool if str(file["kind"]) == "image" else TextPool
        pools: dict[str, Pool] = {}
        for split in ("train", "validation", "test", "other"):
            tokens = torch.from_numpy(file[f"{split}_tokens"].astype(np.int64))
            labels = torch.from_numpy(file[f"{split}_labels"].astype(np.int64))[:, None]
            lengths = (tokens != 0).sum(1) if kind is TextPool else torch.ones(len(tokens)).long()
            pools[split] = kind(
                tokens, lengths, torch.zeros_like(labels), labels, torch.ones_like(labels).float()
            )
    return pools


def prepare_labelled(task: str, folder: Path) -> Path:
    """Make and store a task."""
    path = folder / f"{task}.npz"
    splits = _sentiment(task) if task in SENTIMENT else _shift(task)
    arrays = {"kind": np.array("text" if task in SENTIMENT else "image")}
    for name, (tokens, labels) in splits.items():
        arrays |= {f"{name}_tokens": tokens, f"{name}_labels": labels.astype(np.uint8)}
    store(path, arrays)
    return path


Split = tuple[np.ndarray, np.ndarray]


def _sentiment(task: str) -> dict[str, Split]:
    """Shuffled once; equal texts and the one percent that are longest are left out."""
    tokens, labels = _tokenized(task)
    splits, first = {}, 0
    for name, size in TEXT_SIZES.items():
        splits[name] = (tokens[first : first + size], labels[first : first + size])
        first += size
    splits["train"] = (tokens[first:], labels[first:])
    other, other_labels = _tokenized(OTHER[task])
    width = tokens.shape[1]
    fits = np.flatnonzero((other != 0).sum(1) <= width)[:OTHER_ROWS]
    held = np.zeros((len(fits), width), dtype=tokens.dtype)
    common = min(width, other.shape[1])
    held[:, :common] = other[fits, :common]
    splits["other"] = (held, other_labels[fits])
    return splits


def _tokenized(task: str) -> Split:
    tokenizer = load_minilm_tokenizer()
    rated = dict(sources.rated_sentences(SENTIMENT[task]))
    ids = tokenizer(list(rated))["input_ids"]
    labels = np.array([rating > 0 for rating in rated.values()])
    lengths = np.array([len(row) for row in ids])
    limit = -(-int(np.quantile(lengths, 0.99)) // 8) * 8
    order = np.random.default_rng(0).permutation(len(ids))
    kept = [i for i in order if lengths[i] <= limit]
    tokens = np.zeros((len(kept), limit), dtype=np.uint16)
    for row, i in enumerate(kept):
        tokens[row, : lengths[i]] = ids[i]
    return tokens, labels[kept]


def mnist_half(which: int) -> Split:
    """``(2500, 784)`` images and labels: 0 is the half for pretraining, 1 the half for adaptation."""
    images, labels = sources.mnist()
    order = np.random.default_rng(0).permutation(len(labels))[which::2]
    return images[order].reshape(len(order), -1), labels[order]


def shifted(images: np.ndarray, task: str) -> np.ndarray:
    """Grey images ``(n, side, side)`` of 0 to 255 as a task shows them."""
    if task == "rotated":
        return np.rot90(images, axes=(1, 2))
    if task == "inverted":
        return 255 - images
    if task == "mirrored":
        return images[:, :, ::-1]
    if task == "moved":
        return np.roll(images, (5, 5), axis=(1, 2))
    if task == "faint":
        return images // 4 + 64
    if task == "noisy":
        noise = np.random.default_rng(1).normal(0, 80, images.shape)
        return (images + noise).clip(0, 255).astype(np.uint8)
    raise ValueError(f"no shift is called '{task}' (there are: {', '.join(SHIFTS)})")


def _shift(task: str) -> dict[str, Split]:
    plain, labels = mnist_half(1)
    images = plain.reshape(-1, 28, 28)
    if task != "digits":
        images = shifted(images, task)
    else:
        small, labels = sources.digits()
        order = np.random.default_rng(0).permutation(len(labels))
        grey = (small[order].astype(np.int64) * 255 // 16).astype(np.uint8)
        images = np.pad(grey.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
        labels = labels[order]
    rows = np.ascontiguousarray(images).reshape(len(labels), -1)
    splits, first = {}, 0
    for name, size in IMAGE_SIZES.items():
        splits[name] = (rows[first : first + size], labels[first : first + size])
        first += size
    splits["train"] = (rows[first:], labels[first:])
    before, classes = mnist_half(1)
    held = slice(IMAGE_SIZES["validation"], IMAGE_SIZES["validation"] + OTHER_ROWS)
    # Rows of the test split, as they were before the shift: trained on in neither form.
    splits["other"] = (before[held], classes[held])
    return splits
