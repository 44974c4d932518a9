"""Solving an embedding over the words that were seen: others keep a zero column of ``A``, as PEFT's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.types import Factors, LayerStatistics


def words_of(
    target: Target, layer: LayerStatistics, least: int, beside: Tensor | None = None
) -> Tensor | None:
    """Indices of the words that a layer's statistics say something of, ascending.

    Args:
        target: None is given for any but an embedding, and for statistics that hold nothing of its words.
        layer: its statistics.
        least: how many at least, unseen ones if need be: a pair of a rank needs as many.
        beside: ``(rank, words)``, whose columns that are not zero belong to it, too.
    """
    seen = None
    if not target.spec.one_hot:
        return None
    for tensor in (layer.input_counts, layer.gradient_sum, beside):
        if tensor is not None:
            some = (tensor != 0).reshape(-1, tensor.shape[-1]).any(0).cpu()
            seen = some if seen is None else seen | some
    if seen is None:
        return None
    missing = min(least, len(seen)) - int(seen.sum())
    if missing > 0:
        seen[(~seen).nonzero().squeeze(1)[:missing]] = True
    return seen.nonzero().squeeze(1)


def of_words(layer: LayerStatistics, words: Tensor | None) -> LayerStatistics:
    """The statistics of these words alone."""
    if words is None:
        return layer
    own = {
        name: tensor.index_select(-1, words.to(tensor.device))
        for name in ("gradient_sum", "input_counts", "weight_error")
        if (tensor := getattr(layer, name)) is not None
    }
    return replace(layer, **own)


def narrowed(
    chunk: Sequence[Target],
    weights: Sequence[Tensor],
    layers: Sequence[LayerStatistics],
    factor: int,
) -> tuple[list[Target], list[Tensor], list[LayerStatistics], list[Tensor | None]]:
    """Layers that are solved together, embeddings as those of their words; and the words.

    Args:
        chunk: the layers.
        weights: ``(out, in)`` each.
        layers: their statistics.
        factor: a method needs so many times the rank.
    """
    targets: list[Target] = []
    some_weights, some_layers, found = [], [], []
    for target, weight, layer in zip(chunk, weights, layers, strict=True):
        words = words_of(target, layer, factor * target.spec.rank)
        if words is not None:
            target = replace(target, spec=replace(target.spec, in_features=len(words)))
            weight = weight[:, words.to(weight.device)]
        targets.append(target)
        some_weights.append(weight)
        some_layers.append(of_words(layer, words))
        found.append(words)
    return targets, some_weights, some_layers, found


def widened(rows: Tensor, words: Tensor | None, width: int) -> Tensor:
    """``(..., rank, words)`` with a zero column for every other of `width` words."""
    if words is None:
        return rows
    out = rows.new_zeros(*rows.shape[:-1], width)
    return out.index_copy_(-1, words.to(rows.device), rows)


def all_words(pair: Factors, words: Tensor | None, target: Target) -> Factors:
    """A pair of some words as one of all."""
    return replace(pair, A=widened(pair.A, words, target.spec.in_features))
