"""The loss of held-back sequences at a displaced model, by forward passes alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    def measuring(self) -> Iterator[Callable[[Mapping[str, LowRank]], float]]:
        """Inside, a function: the mean loss with these terms on the layers."""
        model, device = self.subject.model, self.subject.device
        rounds = even_rounds(self.batches, sharded=is_sharded(model))
        moved = [batch.to(device) for batch in rounds]
        present: dict[str, LowRank] = {}

        def loss(terms: Mapping[str, LowRank]) -> float:
            present.clear()
            present.update(terms)
            # Every trial draws the same numbers, if the model or the loss draws any.
            with unchanged_rng(device), torch.no_grad():
                # One read of the device at the end. Who runs more rounds than it has batches, because
                # the others do, does not count them.
                sums = [self._sums(batch) * batch.counts for batch in moved]
            total, count = torch.stack(sums).cpu().double().sum(0).tolist() if sums else (0.0, 0.0)
            total, count = collectives.sum_counts([total, count])
            return total / count if count else math.nan

        with measuring(model), displaced(self.subject.modules, present):
            yield loss

    def _sums(self, batch: Batch) -> Tensor:
        """``(2,)``: the batch's summed loss, and what it is divided by."""
        settings = self.subject.settings
        reduction = settings.loss_reduction
        with tokens_named(self.subject.model, batch):
            result = batch_loss(self.subject.model, batch.content, reduction, settings.loss_fn)
        unit = result.sequences if reduction == "sequence" else result.label_tokens
        total = result.per_sequence.sum()
        return torch.stack([total, unit.to(total)])
