"""The loss of held-back sequences at a displaced model, by forward passes alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from lorainit.calibration.paired import SequenceLosses
from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.models.displacement import LowRank, displaced
from lorainit.models.state import measuring, unchanged_rng
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.loss.batch_loss import batch_loss
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.statistics.settings import Subject

_SEQUENCES, _LABELS = 8, 512
"""Lengths of a step are compared on so many sequences and label tokens, if there are more; see `of_some`."""


@dataclass(frozen=True, eq=False)
class HeldOutLoss:
    """The mean loss of a few batches, over all processes, at a displaced model.

    Attributes:
        subject: the model and its layers; how its loss is taken.
        batches: of the held-back sequences.
    """

    subject: Subject
    batches: Sequence[Batch]

    @contextlib.contextmanager
    def measuring(self) -> Iterator[DisplacedLoss]:
        """Inside, a function: the mean loss with these terms on the layers."""
        model, device = self.subject.model, self.subject.device
        rounds = even_rounds(self.batches, sharded=is_sharded(model))
        measured = DisplacedLoss(self.subject, [batch.to(device) for batch in rounds])
        with measuring(model), displaced(self.subject.modules, measured.terms):
            yield measured


@dataclass(eq=False)
class DisplacedLoss:
    """The mean loss, by the terms on the layers; valid inside `HeldOutLoss.measuring`.

    Attributes:
        subject: the model and its layers.
        batches: on its device.
        terms: those of the newest call.
    """

    subject: Subject
    batches: Sequence[Batch]
    terms: dict[str, LowRank] = field(default_factory=dict)
    _parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    _shift: tuple[float, float] = (0.0, 0.0)

    def of_some(self, base: float) -> DisplacedLoss:
        """The same of the first batches alone, where these do for comparing displacements; else itself.

        They hold at least `_SEQUENCES` sequences and `_LABELS` label tokens over all processes. What it gives
        is an estimate of the loss of all: `base`, and what they differ by from their own part of it.

        Args:
            base: what the newest call gave.
        """
        size = collectives.world()[1]
        sequences = accumulate(int(n) for _, n, _, _ in self._parts)
        labels = accumulate(int(tokens) for _, _, tokens, _ in self._parts)
        enough = (
            count
            for count, (n, tokens) in enumerate(zip(sequences, labels, strict=True), 1)
            if n * size >= _SEQUENCES and tokens * size >= _LABELS
        )
        count = collectives.maximum(next(enough, len(self.batches)))
        if count >= collectives.maximum(len(self.batches)):
            return self
        some = replace(self, batches=self.batches[:count], _parts=self._parts[:count])
        some._shift = base, some._mean()
        return some

    def __call__(self, terms: Mapping[str, LowRank]) -> float:
        """The mean over all processes' sequences, or label tokens."""
        self.terms.clear()
        self.terms.update(terms)
        # Every trial draws the same numbers, if the model or the loss draws any.
        with unchanged_rng(self.subject.device), torch.no_grad():
            parts = [self._part(batch) for batch in self.batches]
        # Who runs more rounds than it has batches, because the others do, does not count them.
        self._parts = [p for p, batch in zip(parts, self.batches, strict=True) if batch.counts]
        base, own = self._shift
        return base + (self._mean() - own)

    def _mean(self) -> float:
        """Of the newest losses, over all processes; one read of the device."""
        sums = [torch.stack([losses.sum(), unit.to(losses)]) for losses, _, _, unit in self._parts]
        total, count = torch.stack(sums).cpu().double().sum(0).tolist() if sums else (0.0, 0.0)
        total, count = collectives.sum_counts([total, count])
        return total / count if count else math.nan

    @property
    def latest(self) -> SequenceLosses:
        """This process's losses of the newest call, sequence by sequence."""
        losses = [losses.reshape(-1).cpu() for losses, _, _, _ in self._parts]
        return SequenceLosses(
            torch.cat(losses) if losses else torch.zeros(0),
            float(sum(int(sequences) for _, sequences, _, _ in self._parts)),
            float(sum(int(unit) for _, _, _, unit in self._parts)),
        )

    def _part(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch's losses, their sequences and label tokens, and what their sum is divided by."""
        settings = self.subject.settings
        reduction = settings.loss_reduction
        with tokens_named(self.subject.model, batch):
            result = batch_loss(self.subject.model, batch.content, reduction, settings.loss_fn)
        unit = result.sequences if reduction == "sequence" else result.label_tokens
        return result.per_sequence, result.sequences, result.label_tokens, unit
