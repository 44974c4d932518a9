"""Reading something of every target's weight, where processes may have to gather the weight together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import part_of_gather


def read_in_turn(
    chunks: Sequence[Sequence[Target]], rank: int, read: Callable[[Target], Tensor]
) -> list[Tensor]:
    """What `read` gives of this process's targets; sharded weights are gathered by all, one at a time.

    Args:
        chunks: the targets of each process, the same on all of them.
        rank: of this process.
        read: something of a target that gathers its weight.
    """
    found = []
    failure: Exception | None = None
    for owner, chunk in enumerate(chunks):
        for target in chunk:
            try:
                if owner == rank:
                    found.append(read(target))
                else:
                    part_of_gather(target.module)
            except Exception as error:
                # The others go on gathering, and this process with them.
                failure = failure or error
    if failure is not None:
        raise failure
    return found
