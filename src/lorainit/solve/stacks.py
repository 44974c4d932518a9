"""Which layers are solved together: stacks of one shape, as large as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

import torch

from lorainit.adapters.targets import Target
from lorainit.parallel import collectives
from lorainit.solve.ownership import device_of
from lorainit.statistics import Statistics
from lorainit.statistics.memory.plan import gib, statistic_bytes
from lorainit.types import OF_INPUT, EstimatesSolve, EstimatesWorkspace, LayerStatistics, Method

_STACK_BYTES = 1 << 30
_CACHE_BYTES = 1 << 25
"""On a processor larger stacks are no quicker: what does not fit its caches takes up to twice as long
(docs/performance.md). Layers that share an input stay together all the same."""

_SHARE_OF_FREE = 10
_SHARE_OF_BUDGET = 16
"""Of the memory that is free, or that the user allows, one part in this many goes into a stack's statistics
in float32: a solve holds them in float64, and intermediates beside them. A method that says what its solves
in float32 take (``workspace``, times those bytes) gets as much of a budget as that allows, up to
`_ENOUGH_BYTES`."""

_ENOUGH_BYTES = 1 << 32

_WORKSPACE = 9
"""A solve of one layer takes so many times its statistics' bytes in float32, beside them."""


def rounds(
    targets: Mapping[str, Target],
    owners: Mapping[str, int],
    size: int,
    statistics: Statistics | None,
    method: Method,
    max_memory: int | None = None,
    *,
    exact: bool = False,
    matrices: int = 1,
) -> Iterator[list[list[Target]]]:
    """Rounds of one chunk for each process, so that all solve at once between two gathers.

    A layer counts with so many `matrices` of its weight's shape in float32 beside its statistics.
    """
    budget = stack_bytes(targets, method, max_memory, exact=exact)
    rank = collectives.world()[0]
    mine = {name: target for name, target in targets.items() if owners[name] == rank}
    own = stacks_of(mine, budget, method.needs, statistics, matrices)
    if size == 1:
        yield from ([chunk] for chunk in own)
        return
    # Which layers share an input is known where their statistics are, so each process says how it cuts.
    known = collectives.gather_objects([[target.name for target in chunk] for chunk in own])
    chunks = [[[targets[name] for name in chunk] for chunk in theirs] for theirs in known]
    yield from (list(turn) for turn in zip_longest(*chunks, fillvalue=[]))


def stacks_of(
    targets: Mapping[str, Target],
    budget: int,
    needs: frozenset[str],
    statistics: Statistics | None = None,
    matrices: int = 1,
) -> Iterator[list[Target]]:
    """Targets of one shape, rank, scaling and device, as many as `budget` bytes allow.

    A layer counts with the statistics that its method needs, and with `matrices` of its weight's shape in
    float32.

    Where `statistics` say so, those that share an input stand together, apart from those that do not
    or with more or fewer others.
    """
    groups: dict[tuple[Any, ...], dict[int, list[Target]]] = {}
    for name, target in targets.items():
        spec = target.spec
        device = next((p.device for p in target.module.parameters()), None)
        # An embedding has words of its own.
        alone = name if spec.one_hot else ""
        key = (spec.out_features, spec.in_features, spec.rank, spec.scaling, device, alone)
        held = None if statistics is None else statistics.get(name)
        source = 0 if held is None else input_key(held)
        groups.setdefault(key, {}).setdefault(source, []).append(target)
    for (rows, columns, *_, device, alone), sources in groups.items():
        sizes = statistic_bytes((rows, columns), needs - {"gradient"}, one_hot=bool(alone))
        once = sum(size for name, size in sizes.items() if name in OF_INPUT)
        each = 4 * matrices * rows * columns + sum(sizes.values()) - once
        by_number: dict[int, list[Target]] = {}
        for members in sources.values():
            together = statistics is not None and len(members) * each + once <= budget
            by_number.setdefault(len(members) if together else 1, []).extend(members)
        for number, members in by_number.items():
            quick = budget if device is not None and device.type == "cuda" else _CACHE_BYTES
            whole = number * max(1, min(budget, quick) // (number * each + once))
            for first in range(0, len(members), whole):
                yield members[first : first + whole]


def together(
    layers: Sequence[LayerStatistics],
    needs: frozenset[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[LayerStatistics, int]:
    """A stack of layers, what belongs to an input that several share in it once.

    Returns:
        What `needs` names of the layers, on the device; and how many consecutive layers share an input: where
        it is above 1 there are two leading dimensions, ``(groups, sharing)``.
    """
    runs = [len(list(run)) for _, run in groupby(map(input_key, layers))]
    sharing = runs[0] if len(set(runs)) == 1 else 1
    moved = [
        layer.only(needs if i % sharing == 0 else needs - OF_INPUT).to(device, dtype)
        for i, layer in enumerate(layers)
    ]
    return LayerStatistics.stack(moved, sharing=sharing), sharing


def stack_bytes(
    targets: Mapping[str, Target],
    method: Method,
    max_memory: int | None = None,
    *,
    exact: bool = False,
) -> int:
    """How large a stack may be, in bytes of its statistics; the same on every process.

    Args:
        targets: the layers.
        method: what they are solved by.
        max_memory: what everything on a device may take, in bytes; None: what is free.
        exact: whether all is in float64.
    """
    budget = None
    for device in {device_of(target) for target in targets.values()}:
        size = _STACK_BYTES
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
            if max_memory is None:
                size = max(size, free // _SHARE_OF_FREE)
            else:
                share = _SHARE_OF_BUDGET
                if isinstance(method, EstimatesWorkspace) and not exact:
                    share = method.workspace
                size = max(1, min(free, max_memory - held) // share)
                size = min(size, _ENOUGH_BYTES)
        budget = size if budget is None else min(budget, size)
    # What is free differs between processes, and all must cut the same.
    return -collectives.maximum(-(budget or _STACK_BYTES))


def solving_bytes(targets: Mapping[str, Target], method: Method, *, exact: bool = False) -> int:
    """What solving the largest layer alone takes beside its statistics, roughly."""
    needs, times = method.needs, _WORKSPACE
    if isinstance(method, EstimatesSolve) and not exact:
        times = method.layer_workspace
    found = 0
    for target in targets.values():
        shape = target.spec.out_features, target.spec.in_features
        own = sum(statistic_bytes(shape, needs, one_hot=target.spec.one_hot).values())
        found = max(found, times * own + _fetched_bytes(target))
    return found


def _fetched_bytes(target: Target) -> int:
    """What an offloaded weight takes while its layer is solved: itself, and as much to be looked at."""
    weight = next(target.module.parameters(), None)
    if weight is None or not weight.is_meta:
        return 0
    return 2 * target.spec.out_features * target.spec.in_features * weight.element_size()


def more_than_there_is(held: int, solving: int, budget: int) -> str | None:
    """What to say where the solve of the largest layer does not fit beside the model; None: it does.

    Args:
        held: bytes that are there all along.
        solving: see `solving_bytes`.
        budget: ``max_memory`` in bytes.
    """
    if held + solving <= budget:
        return None
    return (
        f"solving the largest layer takes about {gib(solving)} beside {gib(held)} that are held, more than "
        f"max_memory ({gib(budget)}): it goes beyond it, or to the processor where the device has no more. "
        f"Give {gib(held + solving)}, or take a method whose solves take less (FILet, EVA)."
    )


def input_key(layer: LayerStatistics) -> int:
    """Equal for layers that hold the very same second moment of their input."""
    moment = layer.input_second_moment_sum
    if moment is None:
        moment = layer.input_counts
    return id(layer) if moment is None else id(moment)
