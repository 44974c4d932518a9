"""The plan of the passes over a model: its bytes added up and, where they may be too many, one row run.

Where more than one pass is needed, or smaller batches, the same row tells whether the model can be measured
block by block, and the quicker way is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.models.convolution import convolution_shape
from lorainit.models.introspection import model_dtype
from lorainit.models.resident import offloaded_bytes
from lorainit.models.state import measuring
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.blocks.calls import NotByBlocksError
from lorainit.statistics.collect.accumulators import LayerSums
from lorainit.statistics.collect.hooks import HookState, hooks_on
from lorainit.statistics.loss.batch_loss import batch_loss, run_forward
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.statistics.memory.block_plan import BlockPlan, make_block_plan
from lorainit.statistics.memory.peak import held_bytes, peak_bytes
from lorainit.statistics.memory.plan import (
    BatchSize,
    OneHotShape,
    Plan,
    default_budget,
    is_easy,
    make_plan,
    total_bytes,
)
from lorainit.statistics.memory.rehearsal import BlockBytes, Rehearsal, rehearse
from lorainit.statistics.positions.model_calls import ModelCalls
from lorainit.statistics.settings import Subject
from lorainit.types import GRADIENT_STATISTICS


@dataclass(frozen=True)
class Chosen:
    """How a model is measured.

    Attributes:
        passes: ordinary passes, which always do.
        blocks: one pass block by block, where that is quicker.
    """

    passes: Plan
    blocks: BlockPlan | None = None

    def __str__(self) -> str:
        """The choice in one line."""
        return str(self.passes if self.blocks is None else self.blocks)


def plan_passes(subject: Subject, batches: Sequence[Batch], workspace: int = 0) -> Chosen:
    """The quickest way, the same on every process; one row is run to know what a batch takes.

    Args:
        subject: what is measured.
        batches: this process's.
        workspace: bytes that are wanted beside a block's statistics, to solve them.

    Raises:
        MemoryPlanError: ``max_memory`` is too small even for one layer a pass.
        ProcessError: the row failed on another process.
    """
    settings, device = subject.settings, subject.device
    found = {name: _shape(module) for name, module in subject.modules.items()}
    shapes = {name: shape or (0, 0) for name, shape in found.items()}
    element = 8 if model_dtype(subject.model) == torch.float64 else 4
    needs = subject.needs
    own = settings.budget
    budget = own if own is not None else default_budget(device)
    held = 0 if budget is None else held_bytes(subject.model, device)
    # The tightest process decides.
    room = [b - h for b, h in collectives.gather_objects((budget or 0, held)) if b]
    if budget is not None and room:
        budget = held + min(room)
    gradient = 2 if settings.gradient_dtype == "bfloat16" else element
    nbytes = total_bytes(shapes, needs, element=element, gradient=gradient)
    if budget is None or (own is None and is_easy(nbytes, budget, held)) or None in found.values():
        return Chosen(make_plan(shapes, needs, None, element=element, gradient=gradient))
    shared, position = _footprint(subject, batches, device)
    sizes = _batch_sizes(batches, position, offloaded_bytes(subject.model)[1])
    known: _Known = {"shared": shared, "element": element, "gradient": gradient, "held": held}
    plan = make_plan(shapes, needs, budget, **known, batches=sizes)
    if len(plan.passes) == 1 and plan.batch.rows is None and plan.peak <= budget:
        return Chosen(plan)
    rehearsal = _rehearsal(subject, batches)
    if isinstance(rehearsal, str):
        plan = replace(plan, note=rehearsal)
        blocks = None
    else:
        blocks = make_block_plan(
            shapes,
            needs,
            budget,
            rehearsal,
            device=device,
            positions=collectives.maximum(sum(batch.positions for batch in batches)),
            batches=sizes,
            workspace=workspace,
            backward=bool(needs & GRADIENT_STATISTICS),
            **known,
        )
    if blocks is not None and (plan.peak > budget or blocks.cost < plan.cost):
        return Chosen(plan, blocks)
    if own is not None and plan.peak > budget:
        # An error that says what would do.
        make_plan(shapes, needs, budget, **known, batches=sizes, strict=True)
    return Chosen(plan)


class _Known(TypedDict):
    """What both kinds of plans are told."""

    shared: list[list[str]]
    element: int
    gradient: int
    held: int


def _rehearsal(subject: Subject, batches: Sequence[Batch]) -> Rehearsal | str:
    """The chain of blocks, the same on every process, and the most it takes on any; or why there is none."""
    if is_sharded(subject.model):
        return "the model is sharded over processes"
    row = max(batches, key=_row_positions, default=None)
    found: Rehearsal | None = None
    with collectives.shared_errors():
        try:
            found = None if row is None else rehearse(subject, row.first_row())
            reason = "a process has no data" if found is None else ""
        except NotByBlocksError as error:
            reason = str(error)
    taken = None if found is None else found.taken
    gathered = collectives.gather_objects((reason, taken))
    for said, _ in gathered:
        if said:
            return str(said)
    assert found is not None
    chain = found.chain
    if not collectives.equal_everywhere((chain.layers, chain.differentiable, chain.outside)):
        return "its rows do not all reach the same blocks"
    most = [max(column) for column in zip(*(astuple(t) for _, t in gathered), strict=True)]
    return Rehearsal(chain, BlockBytes(*most))


def _footprint(
    subject: Subject, batches: Sequence[Batch], device: torch.device
) -> tuple[list[list[str]], float]:
    """Groups of layers that read one input, and the bytes that a position of a batch takes."""
    model, settings = subject.model, subject.settings
    calls = ModelCalls(model, settings.token_mask, device)
    state = HookState(subject.needs, {name: LayerSums() for name in subject.modules}, calls)
    largest = max(batches, key=_row_positions, default=None)
    rows = [] if largest is None else [largest.first_row()]
    sharded = is_sharded(model)
    rounds = even_rounds(rows, sharded=sharded)
    taken = 0.0

    def forward(inputs: Mapping[str, Any]) -> Tensor | None:
        """The loss, where a backward pass will follow."""
        if not state.backward:
            with torch.no_grad():
                run_forward(model, inputs, settings.loss_fn)
            return None
        with torch.enable_grad():
            result = batch_loss(model, inputs, settings.loss_reduction, settings.loss_fn)
            return result.per_sequence.sum()

    # Collectives of a sharded model run in the backward, which everyone begins or nobody.
    shared_work = collectives.shared_errors if sharded else nullcontext
    own_work = nullcontext if sharded else collectives.shared_errors
    with measuring(model), hooks_on(state, subject.modules), own_work():
        for batch in rounds:
            moved = batch.to(device)
            inputs = moved.content
            state.begin_batch(batch.keywords, moved.keywords, counted=False)
            with peak_bytes(device) as peak:
                with shared_work(), tokens_named(model, batch):
                    loss = forward(inputs)
                if loss is not None and loss.requires_grad:
                    torch.autograd.backward(loss)
                del loss
                taken = max(0, peak() - offloaded_bytes(model)[1]) / batch.positions
    groups: dict[int, list[str]] = {}
    for name, sums in state.layers.items():
        groups.setdefault(id(sums.inputs), []).append(name)
    known = [group for group in groups.values() if len(group) > 1]
    both = collectives.gather_objects((known, taken))
    return next((g for g, t in both if t), known), max(t for _, t in both)


def _row_positions(batch: Batch) -> float:
    return batch.positions / max(1, batch.rows)


def _batch_sizes(batches: Sequence[Batch], position: float, weights: int) -> list[BatchSize]:
    """The batches as they come, and cut to fewer and fewer rows, where that can be done.

    Beside what its positions take, a batch takes the largest weight that is fetched for it.
    """
    whole = max((b.positions for b in batches), default=1)
    row = max((_row_positions(b) for b in batches), default=1.0)
    most = max((b.rows for b in batches), default=1)
    whole, row, most, together = (
        max(column)
        for column in zip(
            *collectives.gather_objects((whole, row, most, not all(b.separable for b in batches))),
            strict=True,
        )
    )
    # In two parts, three, four: every number of rows that makes fewer batches than the next one.
    cut = [] if together else list(dict.fromkeys(-(-most // parts) for parts in range(2, most + 1)))
    return [
        BatchSize(None, whole, weights + int(whole * position)),
        *(BatchSize(rows, int(rows * row), weights + int(rows * row * position)) for rows in cut),
    ]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` as the layer says it, whatever its weight is stored as."""
    if (shape := convolution_shape(module)) is not None:
        return shape
    if isinstance(module, nn.Embedding):
        return OneHotShape((module.embedding_dim, module.num_embeddings))
    for names in (("out_features", "in_features"), ("nf", "nx")):
        out, inner = (getattr(module, name, None) for name in names)
        if isinstance(out, int) and isinstance(inner, int):
            return out, inner
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "nf"):
        return weight.shape[1], weight.shape[0]
    return None
