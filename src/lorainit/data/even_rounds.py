"""As many rounds of batches on every process as on every other.

A model that is sharded over the processes runs its collectives in the forward and the backward, so
all processes must run the same number of them: who has fewer batches runs one again that counts
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lorainit.data.batch import Batch
from lorainit.parallel import collectives


def even_rounds(batches: Sequence[Batch], *, sharded: bool) -> list[Batch]:
    """The batches; followed by fillers to one number everywhere, where the model is sharded."""
    rounds = list(batches)
    if not sharded or collectives.world()[1] == 1:
        return rounds
    lengths = collectives.gather_objects(len(batches))
    filler = batches[-1].first_row().filler() if batches else None
    if min(lengths) == 0 and max(lengths) > 0:
        source = next(rank for rank, length in enumerate(lengths) if length)
        box: list[Any] = [None if filler is None else filler.to(torch.device("cpu"))]
        dist.broadcast_object_list(box, src=source)
        filler = filler or box[0]
    if filler is None:
        return rounds
    return rounds + [filler] * (max(lengths) - len(batches))
