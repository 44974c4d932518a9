"""Which batches each process runs: its part of the sample, and as many rounds as every other.

A model that is sharded over the processes runs its collectives in the forward and the backward, so
all processes must run the same number of them: who has fewer batches runs one again that counts
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorainit.errors import DataError
from lorainit.statistics import distributed
from lorainit.statistics.batches import (
    batch_rows,
    one_row,
    population_of,
    row_sequences,
    take,
    to_device,
)


def sample(data: Iterable[Any], max_sequences: int | None) -> list[dict[str, Any]]:
    """This process's part of at most `max_sequences` sequences over all processes.

    Equal parts, where every process has them; who has more gives more. Nothing is drawn from `data`
    beyond the batch that fills the part.

    Raises:
        DataError: no process has a sequence, or something is no dictionary of tensors.
        ProcessError: another process's data failed.
    """
    rank, size = distributed.world()
    kept: list[dict[str, Any]] = []
    if size == 1:
        kept = list(take(data, max_sequences))
    else:
        kept = _shared_sample(data, max_sequences, rank, size)
    if not distributed.anywhere(bool(kept)):
        raise DataError(
            "data gave no sequences: the iterable is empty, or exhausted by an earlier pass. "
            "Give a DataLoader or a list of batches."
        )
    return kept


def _shared_sample(
    data: Iterable[Any], cap: int | None, rank: int, size: int
) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    if cap is None:
        with distributed.together():
            kept += take(data, None)
        return kept
    rest = take(data, None)
    have, exhausted = 0, False
    part = cap // size + (1 if rank < cap % size else 0)
    while True:
        with distributed.together():
            while have < part and not exhausted:
                batch = next(rest, None)
                if batch is None:
                    exhausted = True
                else:
                    kept.append(batch)
                    have += sum(row_sequences(batch, batch_rows(batch)))
        known = distributed.gather_objects((have, exhausted))
        parts = distributed.allotments(cap, [n for n, _ in known], [not end for _, end in known])
        part = parts[rank]
        if all(wanted <= has for wanted, (has, _) in zip(parts, known, strict=True)):
            return list(take(kept, part)) if part else []


def shared_population(data: object) -> int | None:
    """Samples to fine-tune on: one set's length if all processes hold the same, else their sum."""
    lengths = [n for n in distributed.gather_objects(population_of(data)) if n is not None]
    if len(set(lengths)) == 1:
        return int(lengths[0])
    return sum(lengths) if lengths else None


def rows_before(batches: Sequence[Mapping[str, Any]]) -> int:
    """Rows of the processes of lower rank, whatever they have."""
    rank, _ = distributed.world()
    rows = distributed.gather_objects(sum(batch_rows(batch) for batch in batches))
    return int(sum(rows[:rank]))


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it."""
    return any(True for _ in _shards(model))


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of every sharded part; its parameters are the sharded ones again."""
    for part in _shards(model):
        part.reshard()


def _shards(model: nn.Module) -> Iterable[Any]:
    # Nothing is sharded before this module has been imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def even_rounds(
    batches: Sequence[Mapping[str, Any]], *, sharded: bool
) -> list[tuple[Mapping[str, Any], bool]]:
    """Every batch, and whether it counts; of one length everywhere, where the model is sharded."""
    rounds: list[tuple[Mapping[str, Any], bool]] = [(batch, True) for batch in batches]
    if not sharded or distributed.world()[1] == 1:
        return rounds
    lengths = distributed.gather_objects(len(batches))
    filler = one_row(batches[-1]) if batches else {}
    if min(lengths) == 0 and max(lengths) > 0:
        source = next(rank for rank, length in enumerate(lengths) if length)
        box: list[Any] = [to_device(dict(filler), torch.device("cpu"))]
        dist.broadcast_object_list(box, src=source)
        filler = filler if batches else box[0]
    return rounds + [(filler, False)] * (max(lengths) - len(batches))
