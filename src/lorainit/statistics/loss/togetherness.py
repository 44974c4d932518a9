"""What of a batch a loss can be taken of by itself: asked of a loss function, or told by the labels."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.data.packing import packed_segments
from lorainit.data.reading import Together
from lorainit.models.introspection import input_device
from lorainit.models.state import measuring, unchanged_rng
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.loss.batch_loss import LossFunction, batch_loss, label_kind
from lorainit.statistics.loss.vocabulary import tokens_named
from lorainit.types import IGNORED

logger = logging.getLogger("lorainit")

_SAME = 0.02
"""How far a sequence's loss alone may differ from that beside others: other kernels, other padding."""


def losses_together(model: nn.Module, loss_fn: LossFunction, first: Batch | None) -> Together:
    """Whether the sequences of a batch belong together in the eyes of `loss_fn`.

    They do if it gives fewer losses than there are rows (pairs of chosen and rejected answers), or if
    the first sequence has another loss alone than beside the others (losses that compare sequences).
    Two forward passes tell. Batches that are no keywords of tensors are never cut.

    Args:
        model: the user's.
        loss_fn: the user's.
        first: the first batch of this process, None where it has none.

    Raises:
        DataError: what `loss_fn` returns is no loss of each sequence.
    """
    sharded, device = is_sharded(model), input_device(model)

    def losses(batch: Batch) -> Tensor:
        # A sharded model gathers its weights in every forward, so all processes run as many.
        work = collectives.shared_errors() if sharded else nullcontext()
        with work, unchanged_rng(device), torch.no_grad(), tokens_named(model, batch):
            moved = batch.to(device).content
            return batch_loss(model, moved, "sequence", loss_fn).per_sequence.detach().float().cpu()

    rounds = even_rounds([first] if first is not None else [], sharded=sharded)
    found = Together()
    with nullcontext() if sharded else collectives.shared_errors(), measuring(model):
        for batch in rounds:
            every = losses(batch)
            share = len(every) / batch.sequences
            alone = batch.take([True] + [False] * (batch.units - 1))[0]
            # The same number of forward passes everywhere.
            one = losses(alone) if sharded or _as_many(batch, every) else every[:0]
            if not batch.counts:
                continue
            if batch.whole:
                found = Together(True, share)
            elif len(every) <= max(batch.rows, batch.sequences):
                cut = _as_many(batch, every) and _same(one, every[: len(one)])
                found = Together(not cut, share)
    known = collectives.gather_objects((found, first is not None))
    whole = [own for own, has in known if has and own.whole]
    if not whole:
        return Together()
    share = max(own.share for own in whole)
    logger.info(
        "the sequences of a batch belong together in loss_fn (%.3g losses a sequence): batches are not cut",
        share,
    )
    return Together(True, share)


def _as_many(batch: Batch, losses: Tensor) -> bool:
    """Whether there is one loss a row or a sequence of a batch that may be cut."""
    return batch.separable and len(losses) in (batch.rows, batch.sequences)


def _same(alone: Tensor, beside: Tensor) -> bool:
    return torch.allclose(alone, beside, rtol=_SAME, atol=_SAME / 10, equal_nan=True)


def labelled_units(model: nn.Module, batch: Batch) -> list[bool]:
    """Of each unit, whether the default loss counts any of its labels; true where labels are no integers."""
    labels = batch.keywords.get("labels")
    whole = isinstance(labels, Tensor) and labels.dim() > 0 and not labels.is_floating_point()
    if not whole or labels is None or labels.shape[0] != batch.rows:
        return [True] * batch.units
    counted = labels != IGNORED
    if labels.dim() == 2 and label_kind(model, labels) == "causal":
        # Nothing predicts a sequence's first token.
        counted = counted & ~packed_segments(batch.keywords, labels)[1].to(counted.device)
        counted[:, 0] = False
    return batch.units_of(counted)
