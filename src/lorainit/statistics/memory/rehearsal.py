"""One row run both ways, ordinarily and block by block: whether they agree, and what the latter takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lorainit.data.batch import Batch
from lorainit.linalg.dtypes import HALF
from lorainit.models.blocks import block_of_layers, list_blocks
from lorainit.models.introspection import innermost_model
from lorainit.models.resident import offloaded_bytes
from lorainit.models.state import measuring, unchanged_rng
from lorainit.statistics.blocks.block_pass import BlockPass
from lorainit.statistics.blocks.calls import Boundary, Chain, NotByBlocksError
from lorainit.statistics.collect.accumulators import LayerSums
from lorainit.statistics.collect.hooks import HookState, hooks_on
from lorainit.statistics.collect.passes import collected_needs
from lorainit.statistics.loss.batch_loss import batch_loss, run_forward
from lorainit.statistics.memory.peak import peak_bytes
from lorainit.statistics.positions.model_calls import ModelCalls
from lorainit.statistics.settings import Subject

_TOLERANCE = 1e-3
_TOLERANCE_IN_HALF = 5e-2
"""Relative difference between two gradients that are one: other kernels round otherwise."""


@dataclass(frozen=True)
class BlockBytes:
    """What a pass block by block takes beside the sums, in bytes a position.

    Attributes:
        inputs: of all blocks, which wait on the device or on the host.
        others: what else the blocks are called with, masks above all; on the device.
        gradients: between two blocks.
        forward: of a batch, in the forward pass and the backward of what comes after the blocks.
        block: of a batch, in one block's forward and backward.
        weights: bytes of the block that has most offloaded weights, which are there while it runs.
    """

    inputs: float
    others: float
    gradients: float
    forward: float
    block: float
    weights: int = 0


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """A chain that gave one row's gradients, and what it takes."""

    chain: Chain
    taken: BlockBytes


def rehearse(subject: Subject, row: Batch) -> Rehearsal:
    """Run a row ordinarily and block by block; nothing is added up.

    Raises:
        NotByBlocksError: the model is no chain of blocks, or gradients are others.
    """
    blocks = list_blocks(innermost_model(subject.model))
    owners = block_of_layers(blocks, subject.modules)
    if not owners:
        raise NotByBlocksError("its target layers are not in a list of blocks")
    with measuring(subject.model, checkpoints=False), unchanged_rng(subject.device):
        seen = _ordinary(subject, row, blocks)
        chain = _chain(subject, blocks, owners, seen)
        try:
            return Rehearsal(chain, _by_blocks(subject, row, chain, seen))
        except (torch.OutOfMemoryError, NotByBlocksError):
            raise
        except Exception as error:
            # Blocks that write to their inputs, say: the row has just run ordinarily, so passes will do.
            said = (str(error).splitlines() or [""])[0]
            raise NotByBlocksError(f"{type(error).__name__}: {said}") from error


@dataclass(eq=False)
class _Seen:
    """Blocks of an ordinary pass in the order of their calls, and the gradients of what they gave."""

    blocks: list[nn.Module]
    order: list[int] = field(default_factory=list)
    flags: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    gradients: dict[tuple[nn.Module, int], Tensor] = field(default_factory=dict)
    backward: bool = True

    def hooks(self, index: int, *, backward: bool) -> tuple[Callable[..., None], ...]:
        """Before and after a block's call."""

        def enter(module: nn.Module, args: object) -> None:
            if torch.is_grad_enabled() or not backward:
                self.order.append(index)

        def leave(module: nn.Module, args: object, output: Any) -> None:
            flat = tree_leaves(output)
            if not backward:
                self.flags[index] = (False,) * len(flat)
            if not torch.is_grad_enabled():
                return
            self.flags[index] = tuple(isinstance(t, Tensor) and t.requires_grad for t in flat)
            for i, flag in enumerate(self.flags[index]):
                if flag:
                    flat[i].register_hook(self._keep(module, i))

        return enter, leave

    def _keep(self, module: nn.Module, i: int) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            self.gradients[module, i] = gradient.detach().to("cpu", copy=True)

        return keep


def _ordinary(subject: Subject, row: Batch, blocks: list[nn.Module]) -> _Seen:
    calls = ModelCalls(subject.model, subject.settings.token_mask, subject.device)
    layers = {name: LayerSums() for name in subject.modules}
    state = HookState(collected_needs(subject), layers, calls)
    moved = row.to(subject.device)
    seen = _Seen(blocks, backward=state.backward)
    with hooks_on(state, subject.modules), ExitStack() as stack:
        for index, block in enumerate(blocks):
            enter, leave = seen.hooks(index, backward=state.backward)
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        state.begin_batch(row.keywords, moved.keywords, counted=False)
        settings = subject.settings
        if not state.backward:
            with torch.no_grad():
                run_forward(subject.model, moved.content, settings.loss_fn)
            return seen
        with torch.enable_grad():
            result = batch_loss(
                subject.model, moved.content, settings.loss_reduction, settings.loss_fn
            )
            loss = result.per_sequence.sum()
            if loss.requires_grad:
                torch.autograd.backward(loss)
    return seen


def _chain(
    subject: Subject, blocks: list[nn.Module], owners: Mapping[str, int], seen: _Seen
) -> Chain:
    """The blocks that ran, from the first with target layers on."""
    if len(set(seen.order)) != len(seen.order):
        raise NotByBlocksError("it runs its blocks more than once, or in another order")
    missing = set(owners.values()) - set(seen.order)
    if missing:
        raise NotByBlocksError("a row does not reach all of its blocks")
    first = next(place for place, i in enumerate(seen.order) if i in owners.values())
    order = seen.order[first:]
    return Chain(
        tuple(blocks[i] for i in order),
        tuple(seen.flags[i] for i in order),
        tuple(tuple(name for name in owners if owners[name] == i) for i in order),
        tuple(name for name in subject.modules if name not in owners),
    )


def _by_blocks(subject: Subject, row: Batch, chain: Chain, seen: _Seen) -> BlockBytes:
    tolerance = _TOLERANCE
    if any(gradient.dtype in HALF for gradient in seen.gradients.values()):
        tolerance = _TOLERANCE_IN_HALF
    walk = BlockPass(subject, chain, [row], counted=False)
    with peak_bytes(subject.device) as peak:
        walk.forward()
        forward = peak()
    others: dict[int, int] = {}
    passing = block = weights = 0
    for place in range(len(chain.blocks)):
        for call, _ in walk.calls(place):
            for value in call.arguments:
                if isinstance(value, Tensor):
                    others[id(value)] = _bytes(value)
                elif isinstance(value, Boundary) and value.graph is not None:
                    others[id(value)] = _bytes(value.graph)
    for place in reversed(range(len(chain.blocks))):
        found: dict[int, Tensor] = {}
        for call, _ in walk.calls(place):
            known = {i: b.gradient for i, b in enumerate(call.outputs) if b is not None}
            found = {i: g for i, g in known.items() if g is not None}
        truth = {i: g for (m, i), g in seen.gradients.items() if m is chain.blocks[place]}
        if seen.backward and chain.layers[place] and not truth:
            # Or it gives its tensors in an object that only the model can open.
            raise NotByBlocksError("a row does not reach all of its blocks")
        if found.keys() != truth.keys() or any(
            not _close(found[i], truth[i], tolerance) for i in found
        ):
            raise NotByBlocksError("its gradients block by block are others")
        passing = max(passing, sum(_bytes(g) for g in found.values()))
        found.clear()
        with peak_bytes(subject.device) as peak:
            walk.collect(place, chain.layers[place])
            fetched, _ = offloaded_bytes(chain.blocks[place])
            block, weights = max(block, peak() - fetched), max(weights, fetched)
        walk.free(place)
    kept, rest = walk.keeper.there, sum(others.values())
    forward -= offloaded_bytes(subject.model)[1]
    positions = row.positions
    return BlockBytes(
        kept / positions,
        rest / positions,
        passing / positions,
        max(0, forward - kept - rest - passing) / positions,
        max(0, block - passing) / positions,
        max(weights, offloaded_bytes(subject.model)[1]),
    )


def _close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether two gradients are the same to rounding; not if they are not finite."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found, truth = found.to(wide), truth.to(found.device, wide)
    return bool((found - truth).norm() <= tolerance * truth.norm())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
