"""Sums of all processes added: each layer's at the process that owns it, or everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.parallel import collectives
from lorainit.parallel.exchange import (
    Slot,
    balanced_owners,
    broadcast_from_owners,
    reduce_to_owners,
)
from lorainit.statistics.collect.accumulators import InputSums, LayerSums

_LAYER_FIELDS = ("gradient", "output_second_moment", "output_squares")
_INPUT_FIELDS = ("second_moment", "total", "counts")
_FOLDED = frozenset({"output_second_moment", "second_moment"})

_Described = dict[str, tuple[tuple[int, ...], torch.dtype]]


def reduce_layers(
    layers: Mapping[str, LayerSums], device: torch.device, *, gather: bool
) -> dict[str, int]:
    """Add the sums of all processes, in place.

    Processes may have seen different layers, or none: what is missing counts as zero. Layers go on
    sharing an input's sums only where they did on every process that has any; those that share have
    one owner, and owners have about the same bytes. Counts travel in one message.

    Args:
        layers: by name, the same names on every process.
        device: where sums are put that a process had no part of.
        gather: give the sums to every process; if not, a layer's end at its owner alone, and the
            others' parts are freed.

    Returns:
        The owner of every layer that some process has seen, in the order of `layers`.
    """
    names = sorted(layers)
    if collectives.world()[1] == 1:
        return {name: 0 for name in layers if _reached(layers[name], _describe(layers[name]))}
    described = _align(layers, names)
    leaders: dict[int, str] = {}
    leader = {name: leaders.setdefault(id(layers[name].inputs), name) for name in names}
    holders: list[tuple[str, LayerSums | InputSums, str]] = []
    for name in names:
        owned: list[tuple[LayerSums | InputSums, str]] = [(layers[name], f) for f in _LAYER_FIELDS]
        if leader[name] == name:
            owned += [(layers[name].inputs, f) for f in _INPUT_FIELDS]
        holders += [(name, holder, field) for holder, field in owned if field in described[name]]
    weights = dict.fromkeys(leaders.values(), 0)
    for name, _, field in holders:
        shape, dtype = described[name][field]
        weights[leader[name]] += math.prod(shape) * dtype.itemsize
    owners = balanced_owners(weights, collectives.world()[1])
    _add_counts([*layers.values(), *(layers[name].inputs for name in leaders.values())])
    slots = [
        Slot((name, field), owners[leader[name]], *described[name][field], field in _FOLDED)
        for name, _, field in holders
    ]
    # Nothing else holds the tensors from here on: what has been sent is freed on the way.
    tensors = _taken(holders)
    reduce_to_owners(tensors, slots, device)
    if gather:
        broadcast_from_owners(tensors, slots, device)
    for name, holder, field in holders:
        setattr(holder, field, tensors.get((name, field)))
    return {n: owners[leader[n]] for n in layers if _reached(layers[n], described[n])}


def _reached(layer: LayerSums, described: _Described) -> bool:
    return bool(layer.positions or layer.inputs.positions or "gradient" in described)


def _taken(holders: Sequence[tuple[str, LayerSums | InputSums, str]]) -> dict[Any, Tensor]:
    """The tensors that are there, which their holders give up."""
    found: dict[Any, Tensor] = {}
    for name, holder, field in holders:
        tensor = getattr(holder, field)
        if tensor is not None:
            found[name, field] = tensor
            setattr(holder, field, None)
    return found


def _add_counts(holders: Sequence[LayerSums | InputSums]) -> None:
    place = collectives.communication_device(torch.device("cpu"))
    counts = torch.tensor([holder.positions for holder in holders], device=place)
    dist.all_reduce(counts)
    for holder, positions in zip(holders, counts.tolist(), strict=True):
        holder.positions = int(positions)


def _describe(layer: LayerSums) -> _Described:
    pairs = [(field, getattr(layer, field)) for field in _LAYER_FIELDS]
    pairs += [(field, getattr(layer.inputs, field)) for field in _INPUT_FIELDS]
    return {field: (tuple(t.shape), t.dtype) for field, t in pairs if t is not None}


def _align(layers: Mapping[str, LayerSums], names: Sequence[str]) -> dict[str, _Described]:
    """The coarsest sharing that holds on all processes, and what there is of every layer."""
    leaders: dict[int, str] = {}
    own = {name: leaders.setdefault(id(layers[name].inputs), name) for name in names}
    described = {name: _describe(layers[name]) for name in names}
    # Nearly always everyone has seen the same, and one number says so.
    if collectives.equal_everywhere((own, described)):
        return described
    busy = any(layers[name].inputs.positions for name in names)
    gathered = collectives.gather_objects((own if busy else None, described))
    maps = [sharing for sharing, _ in gathered if sharing is not None] or [own]
    common: dict[tuple[str, ...], str] = {}
    for name in names:
        leader = common.setdefault(tuple(sharing[name] for sharing in maps), name)
        if leader == name:
            if own[name] != name:
                layers[name].inputs = layers[name].inputs.clone()
        else:
            layers[name].inputs = layers[leader].inputs
    merged: dict[str, _Described] = {name: {} for name in names}
    for _, theirs in gathered:
        for name in names:
            merged[name].update(theirs[name])
    return merged
