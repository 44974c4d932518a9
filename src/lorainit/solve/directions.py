"""What each layer's directions are worth, where ranks follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, broadcast_from_owners
from lorainit.solve.gathered import read_in_turn
from lorainit.solve.ownership import after_out_of_memory, device_of, layer_owners
from lorainit.solve.stacks import rounds, together
from lorainit.solve.words import of_words, words_of
from lorainit.statistics import Statistics
from lorainit.types import LayerStatistics, RanksDirections


def value_directions(
    targets: Mapping[str, Target],
    statistics: Statistics,
    method: RanksDirections,
    limits: Mapping[str, int],
    max_memory: int | None = None,
    reference: ReferenceWeights | None = None,
) -> dict[str, Tensor]:
    """What each layer's leading directions are worth, ``(limit,)`` by name, the same everywhere.

    Args:
        targets: the layers.
        statistics: of all of them, or of those that this process owns.
        method: what says what a direction is worth.
        limits: how many directions by layer, the same for layers of one shape and rank.
        max_memory: what everything on a device may take, in bytes.
        reference: from which the method gets what quantization took of each layer, as in a solve.
    """
    rank, size = collectives.world()
    owners = layer_owners(targets, statistics)
    found: dict[str, Tensor] = {}
    failure: Exception | None = None
    matrices = 1 if reference is None else 2
    with torch.no_grad():
        for chunks in rounds(
            targets, owners, size, statistics, method, max_memory, matrices=matrices
        ):
            chunk = chunks[rank]
            try:
                errors = _errors(chunks, rank, reference)
                if chunk and failure is None:
                    limit = limits[chunk[0].name]
                    layers = [
                        _layer(target, statistics, limit, error)
                        for target, error in zip(chunk, errors, strict=True)
                    ]
                    values = _values(chunk, layers, method, limit, device_of(chunk[0]))
                    # In one dtype, so that all know what is coming.
                    found |= {t.name: v.cpu().double() for t, v in zip(chunk, values, strict=True)}
            except Exception as error:
                # Others wait for this process where weights are gathered: raise when all are done.
                failure = failure or error
                if size == 1:
                    break
    collectives.raise_everywhere(failure)
    slots = [Slot(n, owners[n], (limits[n],), torch.float64) for n in targets]
    broadcast_from_owners(found, slots, torch.device("cpu"))
    return {name: found[name] for name in targets}


def _errors(
    chunks: Sequence[list[Target]], rank: int, reference: ReferenceWeights | None
) -> Sequence[Tensor | None]:
    """What quantization took of this process's layers, if that is known; one weight at a time is read."""
    if reference is None:
        return [None] * len(chunks[rank])
    known = reference
    return read_in_turn(chunks, rank, lambda t: known.error(t, read_weight(t.module, t.name)))


def _layer(
    target: Target, statistics: Statistics, limit: int, error: Tensor | None
) -> LayerStatistics:
    """With what quantization took; an embedding's of the words that the statistics say something of."""
    held = statistics[target.name]
    held = held if error is None else replace(held, weight_error=error)
    return of_words(held, words_of(target, held, limit))


def _values(
    chunk: list[Target],
    layers: list[LayerStatistics],
    method: RanksDirections,
    limit: int,
    device: torch.device,
) -> list[Tensor]:
    """Of layers of one shape, together; in halves, or on the CPU, where the memory does not do."""
    try:
        stack, sharing = together(layers, method.needs, device)
        values = method.rank_values(stack, limit)
        return list(values if sharing == 1 else values.flatten(0, 1))
    except torch.OutOfMemoryError:
        # Handled below: until here the traceback holds what was allocated.
        pass
    parts, place = after_out_of_memory(chunk, device)
    found, first = [], 0
    for part in parts:
        own = slice(first, first := first + len(part))
        found += _values(part, layers[own], method, limit, place)
    return found
