"""One pass block by block: a forward pass over all batches, then each block's sums over all of them.

From the last block to the first: forward again, backward from the gradient that came from the blocks
above, sums of this block's layers alone. Only one block's sums are there at a time, and what it takes is one
forward pass more. The numbers are those of `lorainit.statistics.collect.passes`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from lorainit.data.batch import Batch
from lorainit.models.introspection import model_dtype
from lorainit.models.resident import resident
from lorainit.parallel import collectives
from lorainit.statistics.blocks.calls import (
    BlockCall,
    BlockRecorder,
    Chain,
    Keeper,
    NotByBlocksError,
)
from lorainit.statistics.collect.accumulators import LayerSums
from lorainit.statistics.collect.hooks import HookState, hooks_on
from lorainit.statistics.collect.passes import (
    Run,
    check_count,
    check_graph,
    collected_needs,
    explained,
    loss_scale,
    say_unknown,
)
from lorainit.statistics.loss.batch_loss import batch_loss, run_forward
from lorainit.statistics.loss.nonfinite import without_bad
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.statistics.positions.calls import InputPositions
from lorainit.statistics.positions.model_calls import ModelCalls
from lorainit.statistics.positions.noted import NotedPositions
from lorainit.statistics.settings import Subject

logger = logging.getLogger("lorainit")

Notes = Mapping[str, list[InputPositions]]


class BlockPass:
    """Blocks' calls of all batches, and the sums of one block at a time.

    Used in this order: `forward`, then for each block from the last to the first `collect` of its layers, in as
    many parts as one likes, and `free`; then `outside`.

    Args:
        subject: what is measured.
        chain: its blocks.
        parts: batches, as they run.
        room: bytes that blocks' inputs may take on their device; None: as many as there are.
        counted: whether anything is added up; if not, it is run for its memory and its gradients.
    """

    def __init__(
        self,
        subject: Subject,
        chain: Chain,
        parts: list[Batch],
        room: int | None = None,
        *,
        counted: bool = True,
    ) -> None:
        self.subject, self.chain, self.parts = subject, chain, list(parts)
        self.room, self.counted = room, counted
        self.skipped = 0
        self._begin()

    def forward(self) -> None:
        """The forward pass of all batches; once more without sequences whose loss is not finite.

        Raises:
            NotByBlocksError: the model is no chain, on this process or another.
            DataError, NonFiniteError, TargetError, ProcessError: as `run_batches`.
        """
        while True:
            reason: NotByBlocksError | None = None
            bad = 0
            with collectives.shared_errors():
                try:
                    self._forward_all()
                    bad = self._without_bad()
                except NotByBlocksError as error:
                    reason = error
            said = collectives.gather_objects(None if reason is None else str(reason))
            if told := [text for text in said if text is not None]:
                self._begin()
                raise NotByBlocksError(told[0])
            if not collectives.any_process(bad > 0):
                return
            self.skipped += bad
            self._begin()

    def calls(self, place: int) -> list[tuple[BlockCall, Notes]]:
        """The calls of one block, one for each batch that reached it."""
        return [(calls[place], notes) for calls, notes in self._batches if place in calls]

    def collect(self, place: int, names: Collection[str]) -> Run:
        """Sums of some layers of one block; the first time, gradients are passed on to the blocks before it."""
        share = True
        while True:
            with collectives.shared_errors():
                state = self._over(place, names, share_inputs=share)
            if not share or collectives.every_process(state.sharing_held()):
                break
            share = False
        say_unknown(state.unknown)
        return self._run(state)

    def free(self, place: int) -> None:
        """Forget a block's inputs and gradients: it and all blocks after it are done."""
        for calls, _ in self._batches:
            if place in calls:
                calls.pop(place).free()

    def outside(self) -> Run:
        """Sums of the layers in none of the blocks, once all blocks are done."""
        names = self.chain.outside
        self._state.layers = {name: self._state.layers[name] for name in names}
        say_unknown(self._state.unknown)
        return self._run(self._state)

    def _begin(self) -> None:
        self.keeper = Keeper(self.room)
        self._batches: list[tuple[dict[int, BlockCall], Notes]] = []
        self._sequences: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._finite: list[Tensor | None] = []
        subject = self.subject
        self._state = HookState(
            collected_needs(subject),
            {name: LayerSums() for name in subject.modules},
            ModelCalls(subject.model, subject.settings.token_mask, subject.device),
            # Whether all batches share would be known too late.
            share_inputs=False,
            gradient_dtype=subject.settings.gradient_dtype,
            dtype=model_dtype(subject.model),
        )
        self._scale = loss_scale(subject.model)

    def _forward_all(self) -> None:
        subject, state = self.subject, self._state
        recorder = BlockRecorder(self.chain, state, self.keeper)
        work = self._loss if state.backward else self._outputs
        hooks = hooks_on(state, subject.modules)
        with hooks, recorder.hooked(), explained(state) as under_way, self._bar() as bar:
            for part in self.parts:
                under_way[:] = [part]
                moved = part.to(subject.device)
                state.begin_batch(part.keywords, moved.keywords, counted=self.counted)
                with tokens_named(subject.model, part):
                    work(part, moved.content)
                self._batches.append(recorder.taken())
                bar.update(part.sequences)
        inside = {name for names in self.chain.layers for name in names}
        if state.arrived_at & inside:
            raise NotByBlocksError("layers of its blocks run outside of them, too")

    def _loss(self, part: Batch, inputs: Mapping[str, Any]) -> None:
        """A batch's forward, and the backward of what comes after the blocks."""
        settings = self.subject.settings
        with torch.enable_grad():
            result = batch_loss(
                self.subject.model, inputs, settings.loss_reduction, settings.loss_fn
            )
            if settings.loss_fn is not None:
                check_count(result.per_sequence, part)
            loss = result.per_sequence.sum()
            if self._state.ran_in_batch:
                check_graph(loss)
            if loss.requires_grad:
                torch.autograd.backward(loss * self._scale if self._scale != 1.0 else loss)
        self._sequences.append(result.sequences)
        self._tokens.append(result.label_tokens)
        self._finite.append(torch.isfinite(result.per_sequence.detach()))

    def _outputs(self, part: Batch, inputs: Mapping[str, Any]) -> None:
        """A batch's forward alone."""
        with torch.no_grad():
            rows = run_forward(self.subject.model, inputs, self.subject.settings.loss_fn)
        self._sequences.append(torch.tensor(part.sequences))
        self._finite.append(None if rows is None else torch.isfinite(rows))

    def _without_bad(self) -> int:
        """Leave out what is not finite; how many sequences that were."""
        # All are asked before the first is waited for.
        every = [None if finite is None else finite.all() for finite in self._finite]
        if all(one is None or bool(one) for one in every):
            return 0
        if not self._state.backward:
            raise NotByBlocksError("not all of its logits are finite")
        left, dropped = [], 0
        for part, finite, one in zip(self.parts, self._finite, every, strict=True):
            rest = [part]
            if finite is not None and one is not None and not bool(one):
                rest, count = without_bad(part, finite, self.subject.settings.on_nonfinite)
                dropped += count
            left += rest
        self.parts = left
        return dropped

    def _over(self, place: int, names: Collection[str], *, share_inputs: bool) -> HookState:
        """Run one block for all batches, with hooks on these of its layers."""
        block = self.chain.blocks[place]
        modules = {name: self.subject.modules[name] for name in names}
        state = HookState(
            self._state.needs,
            {name: LayerSums() for name in modules},
            NotedPositions({}),
            share_inputs,
            self.counted,
            gradient_dtype=self._state.gradient_dtype,
            dtype=self._state.dtype,
        )
        with resident(block), hooks_on(state, modules), explained(state) as under_way:
            for part, (calls, notes) in zip(self.parts, self._batches, strict=True):
                if place in calls:
                    under_way[:] = [part]
                    state.run_again(notes)
                    _run_block(block, calls[place], backward=state.backward)
        return state

    def _run(self, state: HookState) -> Run:
        sequences, tokens = (sum(int(n) for n in ns) for ns in (self._sequences, self._tokens))
        return Run(state, float(sequences), float(tokens), self.skipped, self._scale, [])

    def _bar(self) -> Any:
        total = sum(part.sequences for part in self.parts)
        shown = self.subject.settings.progress and self.counted
        return tqdm(total=total, desc="forward", unit="seq", disable=None if shown else True)


def _run_block(block: nn.Module, call: BlockCall, *, backward: bool) -> None:
    """Forward again, and backward from the gradients of what it gave."""
    args, kwargs, inputs = call.inputs()
    kind = inputs[0][0].device.type if inputs else "cpu"
    graph = torch.enable_grad() if backward else torch.no_grad()
    autocast = contextlib.nullcontext()
    if call.autocast is not None:
        autocast = torch.autocast(kind, call.autocast)  # type: ignore[assignment]
    with graph, autocast:
        output = block(*args, **kwargs)
    if not backward:
        return
    found = [
        (tensor, boundary.gradient)
        for tensor, boundary in zip(tree_leaves(output), call.outputs, strict=True)
        if boundary is not None and boundary.gradient is not None and tensor.requires_grad
    ]
    del output
    if found:
        torch.autograd.backward([t for t, _ in found], [g for _, g in found])
    call.pass_on(inputs)
