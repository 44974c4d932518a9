"""The loss of held-back sequences at a displaced model, by forward passes alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, terms: Mapping[str, LowRank]) -> float:
        """The mean over all processes' sequences, or label tokens."""
        self.terms.clear()
        self.terms.update(terms)
        # Every trial draws the same numbers, if the model or the loss draws any.
        with unchanged_rng(self.subject.device), torch.no_grad():
            parts = [self._part(batch) for batch in self.batches]
        # One read of the device at the end. Who runs more rounds than it has batches, because the others
        # do, does not count them.
        sums = [
            torch.stack([losses.sum(), unit.to(losses)]) * batch.counts
            for (losses, _, unit), batch in zip(parts, self.batches, strict=True)
        ]
        self._parts = [p for p, batch in zip(parts, self.batches, strict=True) if batch.counts]
        total, count = torch.stack(sums).cpu().double().sum(0).tolist() if sums else (0.0, 0.0)
        total, count = collectives.sum_counts([total, count])
        return total / count if count else math.nan

    @property
    def latest(self) -> SequenceLosses:
        """This process's losses of the newest call, sequence by sequence."""
        losses = [losses.reshape(-1).cpu() for losses, _, _ in self._parts]
        return SequenceLosses(
            torch.cat(losses) if losses else torch.zeros(0),
            float(sum(int(sequences) for _, sequences, _ in self._parts)),
            float(sum(int(unit) for _, _, unit in self._parts)),
        )

    def _part(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A batch's losses, how many sequences they are, and what their sum is divided by."""
        settings = self.subject.settings
        reduction = settings.loss_reduction
        with tokens_named(self.subject.model, batch):
            result = batch_loss(self.subject.model, batch.content, reduction, settings.loss_fn)
        unit = result.sequences if reduction == "sequence" else result.label_tokens
        return result.per_sequence, result.sequences, unit
