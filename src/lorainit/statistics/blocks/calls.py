"""What the blocks of a chain are called with, and what passes between them, kept so that they can run again.

Inside `BlockRecorder.hooked` a block runs without a graph, and what it gives begins a new one. So the forward
pass of a batch leaves graphs of what is computed between blocks and after them, and a record of every block's
call. Run again with a graph, each block by itself takes gradients from its outputs to its inputs: gradient
checkpointing (Chen et al. 2016, arXiv 1604.06174), but for all batches of a block before the next
block, as layer-wise calibration goes through a model (GPTQ, Frantar et al. 2023, arXiv 2210.17323).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lorainit.statistics.collect.hooks import HookState
from lorainit.statistics.positions.calls import InputPositions


class NotByBlocksError(Exception):
    """The model is no chain of blocks, for the reason that is said; passes do."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Blocks in the order in which the model runs them.

    Attributes:
        blocks: each called at most once in a forward pass.
        differentiable: of each block's output, flattened, which tensors depend on target layers.
        layers: of each block, names of its target layers.
        outside: names of the target layers in none of the blocks.
    """

    blocks: tuple[nn.Module, ...]
    differentiable: tuple[tuple[bool, ...], ...]
    layers: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...] = ()


@dataclass(eq=False)
class Boundary:
    """A tensor that a block was called with, or that it gave.

    Attributes:
        differentiable: whether it depends on target layers.
        device: where the block had it.
        data: its numbers, on that device or on the host; None where no block reads it.
        gradient: the loss's by it, added up so far.
        graph: the tensor itself, where it was computed between blocks.
    """

    differentiable: bool
    device: torch.device
    data: Tensor | None = None
    gradient: Tensor | None = None
    graph: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add to the gradient; what was given is not written to."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def again(self) -> Tensor:
        """The tensor, for one more run of a block."""
        assert self.data is not None
        found = self.data.to(self.device, non_blocking=True).detach()
        return found.requires_grad_(self.differentiable)


class Keeper:
    """Keeps tensors where they are while there is room, else in pinned memory of the host."""

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self.there = 0
        self.on_host = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor or a copy on the host."""
        size = tensor.numel() * tensor.element_size()
        if not tensor.is_cuda or self.room is None or self.there + size <= self.room:
            self.there += size
            return tensor
        self.on_host += size
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


@dataclass(eq=False)
class BlockCall:
    """One call of one block.

    Attributes:
        place: of the block in its chain.
        arguments: flattened; boundaries in place of the tensors between blocks.
        structure: of the arguments, as positional ones and keywords.
        outputs: of what it gave, flattened, the boundaries that depend on target layers.
        opens: boundaries that this call was the first to read.
        autocast: the dtype that it ran under, where it did.
        passed: whether its inputs' gradients are known and passed on.
    """

    place: int
    arguments: list[Any]
    structure: TreeSpec
    outputs: list[Boundary | None] = field(default_factory=list)
    opens: list[Boundary] = field(default_factory=list)
    autocast: torch.dtype | None = None
    passed: bool = False

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[Boundary, Tensor]]]:
        """The arguments for one more run, and the tensors among them that stand for boundaries."""
        made = {id(a): (a, a.again()) for a in self.arguments if isinstance(a, Boundary)}
        flat = [made[id(a)][1] if isinstance(a, Boundary) else a for a in self.arguments]
        args, kwargs = tree_unflatten(flat, self.structure)
        return args, kwargs, list(made.values())

    def pass_on(self, inputs: Sequence[tuple[Boundary, Tensor]]) -> None:
        """Give the gradients of the inputs to what computed them; once, however often the block runs."""
        if self.passed:
            return
        self.passed = True
        for boundary, tensor in inputs:
            if tensor.grad is not None:
                boundary.add(tensor.grad)
        roots, gradients = [], []
        for boundary in self.opens:
            if boundary.graph is not None and boundary.gradient is not None:
                roots.append(boundary.graph)
                gradients.append(boundary.gradient)
                boundary.graph = boundary.gradient = None
        if roots:
            # Together: they may have parts of their graphs in common.
            torch.autograd.backward(roots, gradients)

    def free(self) -> None:
        """Forget what no other block needs: all later ones are done."""
        for boundary in self.opens:
            boundary.data = boundary.graph = None
        for output in self.outputs:
            if output is not None:
                output.gradient = None


class _BeginGraph(torch.autograd.Function):
    """Identity on a block's output, from which on there is a graph; its backward gives the gradient away."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, boundary: Boundary) -> Tensor:
        ctx.mark_dirty(output)
        ctx.boundary = boundary
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.boundary.add(grads[0].detach())
        return None, None, None


class BlockRecorder:
    """Hooks on a chain's blocks; the calls of the batch under way by their place in the chain."""

    def __init__(self, chain: Chain, state: HookState, keeper: Keeper) -> None:
        self.chain, self.state, self.keeper = chain, state, keeper
        self.calls: dict[int, BlockCall] = {}
        self._places = {id(block): place for place, block in enumerate(chain.blocks)}
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Boundary]] = {}
        self._running: list[BlockCall | None] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def taken(self) -> tuple[dict[int, BlockCall], dict[str, list[InputPositions]]]:
        """The batch's calls, and the positions that its layers read; the next batch may begin."""
        calls, self.calls = self.calls, {}
        self._known.clear()
        return calls, self.state.notes

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks for the time of the context."""
        with ExitStack() as stack:
            stack.callback(self._known.clear)
            stack.callback(self._running.clear)
            stack.callback(setattr, self.state, "deferred", False)
            for block in self.chain.blocks:
                enter = block.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(block.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = self._places[id(block)]
        if self.state.backward and not torch.is_grad_enabled():
            # A reference forward, of which nothing is collected.
            self._running.append(None)
            return
        if self._running or any(place <= other for other in self.calls):
            raise NotByBlocksError("it runs its blocks more than once, or in another order")
        flat, structure = tree_flatten((args, kwargs))
        call = BlockCall(place, [], structure)
        kind = next((a.device.type for a in flat if isinstance(a, Tensor)), "cpu")
        if torch.is_autocast_enabled(kind):
            call.autocast = torch.get_autocast_dtype(kind)
        for value in flat:
            if any("Cache" in parent.__name__ for parent in type(value).__mro__):
                raise NotByBlocksError("its blocks are given a cache")
            # Hidden states come first; whatever else there is, masks and rotations, all blocks share.
            hidden = not any(isinstance(a, Tensor | Boundary) for a in call.arguments)
            call.arguments.append(self._kept(value, call, hidden=hidden))
        self._running.append(call)
        self.state.deferred = True
        if self.state.backward:
            torch.set_grad_enabled(False)

    def _leave(self, block: nn.Module, args: object, output: Any) -> Any:
        call = self._running.pop()
        if call is None:
            return None
        self.state.deferred = False
        self.calls[call.place] = call
        if not self.state.backward:
            return None
        torch.set_grad_enabled(True)
        flat, structure = tree_flatten(output)
        flags = self.chain.differentiable[call.place]
        if len(flat) != len(flags):
            raise NotByBlocksError("its blocks do not give the same in every batch")
        for i, (value, flag) in enumerate(zip(flat, flags, strict=True)):
            if not (flag and isinstance(value, Tensor)):
                call.outputs.append(None)
                continue
            boundary = Boundary(True, value.device)
            call.outputs.append(boundary)
            flat[i] = _BeginGraph.apply(value.detach(), self._anchor, boundary)  # type: ignore[no-untyped-call]
            self._note(flat[i], boundary)
        return tree_unflatten(flat, structure)

    def _kept(self, value: Any, call: BlockCall, *, hidden: bool) -> Any:
        """A boundary in place of a tensor that may have a gradient, and of the hidden states."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        reference, version, boundary = self._known.get(id(value), (None, 0, None))
        # One that was written to since is another tensor, with a graph.
        same = reference is not None and reference() is value and version == value._version
        if boundary is None or not same:
            if not (hidden or value.requires_grad):
                return value
            graph = value if value.requires_grad else None
            boundary = Boundary(value.requires_grad, value.device, graph=graph)
            self._note(value, boundary)
        if boundary.data is None:
            boundary.data = self.keeper.keep(value.detach())
            call.opens.append(boundary)
        return boundary

    def _note(self, tensor: Tensor, boundary: Boundary) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), tensor._version, boundary
