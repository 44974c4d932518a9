"""Models that are cut over the processes, by ``fully_shard`` or by DeepSpeed's ZeRO-3."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorainit.parallel.partitioned import has_partitioned, partition_again


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it, or ZeRO-3 partitioned it."""
    return any(True for _ in _shards(model)) or has_partitioned(model)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights of every sharded part; its parameters are the sharded ones again."""
    for part in _shards(model):
        part.reshard()
    if has_partitioned(model):
        partition_again(model)


def _shards(model: nn.Module) -> Iterable[Any]:
    # Nothing is sharded before this module has been imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]
