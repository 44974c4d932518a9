"""Sums and counts over all processes: they merge by addition, and are divided only afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lorainit.statistics.accumulators import LayerSums


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of(total: int | None) -> int | None:
    """This process's share of a cap that holds over all processes."""
    if total is None:
        return None
    rank, size = world()
    return total // size + (1 if rank < total % size else 0)


def gather_objects(value: object) -> list[object]:
    """Every process's value, in rank order; just this one's without a process group."""
    _, size = world()
    if size == 1:
        return [value]
    values: list[object] = [None] * size
    dist.all_gather_object(values, value)
    return values


def sum_counts(counts: Sequence[float]) -> list[float]:
    """Each count added over all processes."""
    return [float(sum(column)) for column in zip(*gather_objects(list(counts)), strict=True)]  # type: ignore[call-overload]


def communication_device(default: torch.device) -> torch.device:
    """Where a tensor must lie to travel: the accelerator under NCCL, else where it is."""
    if world()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return default


_LAYER_FIELDS = ("gradient", "output_second_moment", "output_squares")
_INPUT_FIELDS = ("second_moment", "total")


def reduce_layers(layers: Mapping[str, LayerSums], device: torch.device) -> None:
    """Add the sums of all processes, in place, one layer after the other in sorted order.

    Processes may have seen different layers, or none: what is missing counts as zero. Layers go on
    sharing an input's sums only where they did on every process that has any.
    """
    if world()[1] == 1:
        return
    names = sorted(layers)
    _align_sharing(layers, names)
    descriptions = gather_objects({name: _describe(layers[name]) for name in names})
    seen: set[int] = set()
    for name in names:
        layer = layers[name]
        merged: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for description in descriptions:
            merged.update(description[name])  # type: ignore[index]
        for field in _LAYER_FIELDS:
            _reduce_field(layer, field, merged.get(field), device)
        layer.positions = int(sum_counts([layer.positions])[0])
        if id(layer.inputs) not in seen:
            seen.add(id(layer.inputs))
            for field in _INPUT_FIELDS:
                _reduce_field(layer.inputs, field, merged.get(field), device)
            layer.inputs.positions = int(sum_counts([layer.inputs.positions])[0])


def _describe(layer: LayerSums) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    pairs = [(field, getattr(layer, field)) for field in _LAYER_FIELDS]
    pairs += [(field, getattr(layer.inputs, field)) for field in _INPUT_FIELDS]
    return {field: (tuple(t.shape), t.dtype) for field, t in pairs if t is not None}


def _reduce_field(
    owner: object,
    field: str,
    described: tuple[tuple[int, ...], torch.dtype] | None,
    device: torch.device,
) -> None:
    if described is None:
        return
    tensor: Tensor | None = getattr(owner, field)
    if tensor is None:
        tensor = torch.zeros(described[0], dtype=described[1], device=device)
    travelling = tensor.to(communication_device(tensor.device)).contiguous()
    dist.all_reduce(travelling, op=dist.ReduceOp.SUM)
    setattr(owner, field, travelling.to(tensor.device))


def _align_sharing(layers: Mapping[str, LayerSums], names: Sequence[str]) -> None:
    """Give every process the coarsest sharing that holds on all of them."""
    leaders: dict[int, str] = {}
    own = {name: leaders.setdefault(id(layers[name].inputs), name) for name in names}
    busy = any(layers[name].inputs.positions for name in names)
    maps = [m for m in gather_objects(own if busy else None) if m is not None]
    common: dict[tuple[str, ...], str] = {}
    for name in names:
        key = tuple(m[name] for m in maps)  # type: ignore[index]
        leader = common.setdefault(key, name)
        if leader == name:
            if own[name] != name:
                layers[name].inputs = layers[name].inputs.clone()
        else:
            layers[name].inputs = layers[leader].inputs
