"""One pass over the batches: forward, backward, and what to do about losses that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.errors import DataError, TargetError
from lorainit.models.introspection import model_dtype
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.collect.accumulators import LayerSums
from lorainit.statistics.collect.hooks import HookState, hooks_on
from lorainit.statistics.loss.batch_loss import batch_loss, run_forward
from lorainit.statistics.loss.nonfinite import DeferredChecks, checks_at_once, without_bad
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.statistics.positions.model_calls import ModelCalls
from lorainit.statistics.settings import CollectSettings, Subject

logger = logging.getLogger("lorainit")

_FP16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True, eq=False)
class Run:
    """What one pass left behind.

    Attributes:
        state: the layers' sums.
        sequences: that counted.
        label_tokens: of these sequences.
        skipped: sequences whose loss is not finite.
        loss_scale: what every loss was multiplied by for its backward.
        outputs: by batch, of a pass without losses: ``(rows,)`` numbers, finite where the row is.
    """

    state: HookState
    sequences: float
    label_tokens: float
    skipped: int
    loss_scale: float
    outputs: list[Tensor | None]


def run_batches(subject: Subject, batches: Sequence[Batch], rows: int | None) -> Run:
    """One pass; one more without shared inputs if layers that shared are apart in another batch.

    And where there is no loss to look at, once more without the sequences that are not finite.

    Args:
        subject: what is measured.
        batches: this process's.
        rows: at once; None: the batches as they come.

    Raises:
        DataError: a loss function that does not give one loss a sequence.
        NonFiniteError: a loss that is not finite, where that is not allowed.
        TargetError: the loss depends on no target layer.
        ProcessError: any of these on another process.
    """
    parts = [part for batch in batches for part in batch.cut(rows)]
    share, dropped = True, 0
    while True:
        with collectives.shared_errors():
            run = _pass(subject, parts, share_inputs=share)
            parts, bad = _without_suspects(parts, run, subject.settings)
        dropped += bad
        if not collectives.any_process(bad > 0):
            if not share or collectives.every_process(run.state.sharing_held()):
                say_unknown(run.state.unknown)
                return replace(run, skipped=run.skipped + dropped)
            logger.info("inputs shared in one batch were not in another; collecting them apart")
            share = False
        # Its sums make room for the next pass's.
        del run


def _pass(subject: Subject, parts: list[Batch], *, share_inputs: bool) -> Run:
    """Run every batch once.

    On a device that nobody should wait for, losses are looked at when it is done with them; a bad one
    costs the pass, and the next looks at each loss before its backward, as is done elsewhere.
    """
    late = not (is_sharded(subject.model) or checks_at_once(subject.device))
    under_way = _Pass(subject, share_inputs, DeferredChecks() if late else None)
    spoiled = under_way.over(parts)
    if spoiled is not None:
        if subject.settings.on_nonfinite == "raise":
            without_bad(*spoiled, subject.settings.on_nonfinite)
        logger.info("batch %d has a loss that is not finite: beginning again", spoiled[0].index)
        del under_way
        under_way = _Pass(subject, share_inputs, None)
        under_way.over(parts)
    return under_way.result()


class _Pass:
    """A pass under way: the layers' sums, and what is counted beside them."""

    def __init__(self, subject: Subject, share_inputs: bool, checks: DeferredChecks | None) -> None:
        self.subject = subject
        self.device = subject.device
        self.sharded = is_sharded(subject.model)
        self.scale = loss_scale(subject.model)
        self.state = HookState(
            collected_needs(subject),
            {name: LayerSums() for name in subject.modules},
            ModelCalls(subject.model, subject.settings.token_mask, subject.device),
            share_inputs,
            gradient_dtype=subject.settings.gradient_dtype,
            dtype=model_dtype(subject.model),
        )
        self.checks = checks
        self.sequences: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.outputs: list[Tensor | None] = []
        self.left: list[Batch] = []
        self.skipped = 0

    def over(self, parts: list[Batch]) -> tuple[Batch, Tensor] | None:
        """Run the batches; one that checks find bad ends it, and comes back with its finite ones."""
        settings, state = self.subject.settings, self.state
        work = self._backward if state.backward else self._forward
        bar = tqdm(
            total=sum(part.sequences for part in parts if part.counts),
            desc="statistics",
            unit="seq",
            disable=None if settings.progress else True,
        )
        taps = hooks_on(state, self.subject.modules)
        with bar, taps, explained(state) as under_way:
            for part in _rounds(parts, self.left, sharded=self.sharded):
                under_way[:] = [part]
                moved = part.to(self.device)
                state.begin_batch(part.keywords, moved.keywords, counted=part.counts)
                with tokens_named(self.subject.model, part):
                    bar.update(work(part, moved.content))
                if self.checks is not None and (spoiled := self.checks.bad()) is not None:
                    return spoiled
        return None if self.checks is None else self.checks.bad(wait=True)

    def result(self) -> Run:
        """What all batches came to; waits for the device."""
        return Run(
            self.state,
            float(sum(int(n) for n in self.sequences)),
            float(sum(int(n) for n in self.tokens)),
            self.skipped,
            self.scale,
            self.outputs,
        )

    def _forward(self, part: Batch, inputs: Mapping[str, Any]) -> int:
        """A batch's forward alone; how many sequences are done with."""
        rows = part.sequences if part.counts else 0
        with torch.no_grad(), self._shared_work():
            seen = run_forward(self.subject.model, inputs, self.subject.settings.loss_fn)
        if part.counts:
            self.outputs.append(seen)
        self.sequences.append(torch.tensor(rows))
        return rows

    def _backward(self, part: Batch, inputs: Mapping[str, Any]) -> int:
        """A batch's forward and backward; how many sequences are done with."""
        subject, taken_out = self.subject, 0
        rows = part.sequences if part.counts else 0
        with torch.enable_grad():
            with self._shared_work():
                result = batch_loss(
                    subject.model, inputs, subject.settings.loss_reduction, subject.settings.loss_fn
                )
                if subject.settings.loss_fn is not None and part.counts:
                    check_count(result.per_sequence, part)
                loss = result.per_sequence.sum()
                finite = self._goes_on(part, loss)
                if not finite:
                    taken_out = self._set_aside(part, result.per_sequence)
                elif self.state.ran_in_batch or self.sharded:
                    check_graph(loss)
            self.state.counts = self.state.counts and finite
            # A batch may reach none of the targets: text alone, where a vision model is the target.
            if loss.requires_grad and (finite or self.sharded):
                torch.autograd.backward(loss * self.scale if self.scale != 1.0 else loss)
        if not self.state.counts:
            return taken_out
        self.sequences.append(result.sequences)
        self.tokens.append(result.label_tokens)
        if self.checks is not None:
            self.checks.add(part, result.per_sequence)
        return rows

    def _shared_work(self) -> Any:
        """Where the backward is shared work, nobody begins it unless everyone can."""
        return collectives.shared_errors() if self.sharded else nullcontext()

    def _goes_on(self, part: Batch, loss: Tensor) -> bool:
        """Whether a loss may have its backward: it is finite, or nobody looks, or it counts nothing."""
        if self.checks is not None or not part.counts:
            return True
        return bool(torch.isfinite(loss.detach()))

    def _set_aside(self, part: Batch, losses: Tensor) -> int:
        """Take the bad sequences out of a batch, and say how many they were."""
        finite = torch.isfinite(losses.detach())
        rest, count = without_bad(part, finite, self.subject.settings.on_nonfinite)
        self.skipped += count
        # What is left of it has its turn when all others have had theirs.
        self.left += rest
        return count


def collected_needs(subject: Subject) -> frozenset[str]:
    """Statistics that are added up: the full matrix of the outputs serves their diagonal too."""
    if "output_second_moment" in subject.needs:
        return subject.needs - {"output_second_moment_diagonal"}
    return subject.needs


def loss_scale(model: nn.Module) -> float:
    """What losses are multiplied by for their backward, so that gradients in float16 do not vanish."""
    return _FP16_LOSS_SCALE if model_dtype(model) == torch.float16 else 1.0


def _rounds(parts: list[Batch], left: list[Batch], *, sharded: bool) -> Iterator[Batch]:
    """Every batch, then what has come to be `left` of some, as often on every process as it must."""
    while collectives.any_process(bool(parts)) if sharded else parts:
        yield from even_rounds(parts, sharded=sharded)
        parts = list(left)
        left.clear()


def check_graph(loss: Tensor) -> None:
    """Targets ran, and yet the loss may have no graph.

    Raises:
        TargetError: it has none.
    """
    if not loss.requires_grad:
        raise TargetError(
            "the loss does not depend on any target layer: none of the targets ran in "
            "the forward pass, or the loss was computed under torch.no_grad()."
        )


def check_count(losses: Tensor, part: Batch) -> None:
    """A loss function of the user's own might return one loss per token."""
    count, sequences = losses.shape[0], part.sequences
    if not part.whole and count not in (sequences, part.rows):
        raise DataError(
            f"loss_fn returned {count} losses for batch {part.index}, which has {sequences} "
            "sequences. It must return one loss per sequence: average over each sequence's tokens."
        )


def _without_suspects(
    parts: list[Batch], run: Run, settings: CollectSettings
) -> tuple[list[Batch], int]:
    """After a pass without losses: the batches without rows that spoiled the sums, and how many."""
    finite = [None if rows is None else torch.isfinite(rows) for rows in run.outputs]
    known = [rows.all() for rows in finite if rows is not None]
    if not known or bool(torch.stack(known).all()) or run.state.finite():
        return parts, 0
    left, dropped = [], 0
    for part, rows in zip(parts, finite, strict=True):
        rest = [part]
        if rows is not None and not bool(rows.all()):
            rest, count = without_bad(part, rows, settings.on_nonfinite)
            dropped += count
        left += rest
    return left, dropped


def say_unknown(unknown: Mapping[str, tuple[int, ...]]) -> None:
    """Say of which layers it is not known where their padding is."""
    if unknown:
        name, shape = next(iter(unknown.items()))
        logger.warning(
            "the inputs of %d layer(s) do not lie like the attention mask that the model was called with "
            "(first '%s', %s), so all of their positions are counted, and padding too if it is among "
            "them; batches without padding avoid that",
            len(unknown),
            name,
            shape,
        )


@contextmanager
def explained(state: HookState) -> Iterator[list[Batch]]:
    """Say what there was no memory for, and what to do about it; the list holds the batch."""
    under_way: list[Batch] = []
    try:
        yield under_way
    except torch.OutOfMemoryError as error:
        part = under_way[0]
        size = sum(t.numel() * t.element_size() for t in state.tensors()) / 2**30
        shapes = ", ".join(
            f"{k} {tuple(v.shape)}" for k, v in part.keywords.items() if isinstance(v, Tensor)
        )
        raise torch.OutOfMemoryError(
            f"out of memory while statistics were taken of batch {part.index} ({shapes}); the sums "
            f"of {len(state.layers)} layers take {size:.3g} GiB of it. Give smaller batches or "
            "shorter sequences (the statistics do not depend on the batches), call "
            "model.gradient_checkpointing_enable() and model.train(), or pass max_memory='20GiB', or "
            "whatever is free, to plan for smaller batches and fewer layers at a time. "
            f"{str(error).splitlines()[0]}"
        ) from error
