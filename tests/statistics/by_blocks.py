"""A pass block by block, whatever the memory plan would choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lorainit.data.sampling import draw_sample
from lorainit.statistics import Statistics
from lorainit.statistics.collection import PlannedCollection, plan_collection
from lorainit.statistics.memory.block_plan import make_block_plan
from lorainit.statistics.memory.plan import BatchSize
from lorainit.statistics.memory.rehearsal import rehearse
from tests.measuring import subject


def planned_by_blocks(
    model: Any, modules: Any, data: Any, needs: Any, *, room: int = 1 << 40, **options: Any
) -> PlannedCollection:
    """`room` is what one block's sums may take together."""
    sample = draw_sample(data, None)
    of = subject(model, modules, needs, **options)
    rehearsal = rehearse(of, max(sample.batches, key=lambda b: b.positions / b.rows).first_row())
    blocks = make_block_plan(
        {n: (m.out_features, m.in_features) if hasattr(m, "out_features") else (m.nf, m.nx)
         for n, m in modules.items()},
        of.needs,
        room,
        replace(rehearsal, taken=replace(rehearsal.taken, inputs=0, others=0, gradients=0, block=0, forward=0)),
        device=torch.device("cpu"),
        positions=0,
        batches=[BatchSize()],
    )  # fmt: skip
    assert blocks is not None
    return replace(plan_collection(of, sample), blocks=blocks)


def collected_by_blocks(model: Any, modules: Any, data: Any, needs: Any, **how: Any) -> Statistics:
    """All parts as one; each layer is in one of them."""
    found = {}
    for part in planned_by_blocks(model, modules, data, needs, **how).parts():
        assert not found.keys() & set(part)
        found |= dict(part)
    return Statistics({name: found[name] for name in modules if name in found})
