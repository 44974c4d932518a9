"""Every sequence's own loss, from the logits: a batch's mean loss mixes sequences.

With ``l_i`` the loss of sequence ``i``, one backward of ``sum_i l_i`` gives each sequence its own
scale, whatever batch it came in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.data.packing import packed_segments
from lorainit.data.reading import ALL_MASKED as ALL_MASKED
from lorainit.errors import DataError
from lorainit.linalg.dtypes import sum_dtype
from lorainit.models.introspection import accepts, innermost_model
from lorainit.statistics.loss.cross_entropy import token_losses
from lorainit.types import IGNORED, LossReduction

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch) -> (sequences,)`` losses, one for each sequence of the batch, or for what belongs
together in it. A batch is what the data gave, on the model's device; of one that is no dictionary of
tensors a single number is a loss too."""

LabelKind = Literal["causal", "aligned", "sample"]
"""Token labels one step ahead of the logits, token labels beside them, or one label a sample."""


@dataclass(frozen=True)
class BatchLoss:
    """What one batch's forward gave.

    Attributes:
        per_sequence: ``(sequences,)`` losses in the units of the reduction, with their graph; zero
            for a sequence without labels.
        sequences: how many of them have a label, a 0-dim integer tensor.
        label_tokens: how many labels they have together, a 0-dim integer tensor.
    """

    per_sequence: Tensor
    sequences: Tensor
    label_tokens: Tensor


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    reduction: LossReduction,
    loss_fn: LossFunction | None = None,
) -> BatchLoss:
    """Run the model on one batch; the default loss, or the user's.

    A user's `loss_fn` decides its own reduction inside a sequence; under ``"token"`` it should
    return sums, which are divided at the end by the labels of ``batch["labels"]`` that are not -100.
    """
    if loss_fn is None:
        return _default_loss(model, batch, reduction)
    losses = loss_fn(model, batch)
    flat = isinstance(batch, Mapping) and any(isinstance(v, Tensor) for v in batch.values())
    if isinstance(losses, Tensor) and losses.dim() == 0 and not flat:
        losses = losses.unsqueeze(0)
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise DataError(
            "loss_fn must return one loss per sequence, a (sequences,) tensor; it returned "
            f"{shape}. "
            "Use reduction='none' in the loss and average over each sequence's own tokens."
        )
    rows = losses.shape[0]
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() > 0 and not labels.is_floating_point():
        counted = labels != IGNORED
        # Rows of labels say which sequences count, unless several are packed into a row.
        whole = counted.reshape(rows, -1).any(-1).sum() if labels.shape[0] == rows else None
        return BatchLoss(losses, torch.tensor(rows) if whole is None else whole, counted.sum())
    return BatchLoss(losses, torch.tensor(rows), torch.tensor(rows))


def run_forward(
    model: nn.Module, batch: Mapping[str, Any], loss_fn: LossFunction | None = None
) -> Tensor | None:
    """Run the model on one batch for the sake of its hooks; labels are not needed.

    Returns:
        ``(rows,)``, the sum of each row's logits, or the losses of `loss_fn`: not finite where the
        row is not; None where there are no logits.
    """
    if loss_fn is not None:
        losses = loss_fn(model, batch)
        return losses if isinstance(losses, Tensor) and losses.dim() == 1 else None
    outputs = model(**_model_inputs(model, batch))
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        return None
    return logits.flatten(1).sum(1, dtype=torch.float32) if logits.dim() > 1 else logits.float()


def label_kind(model: nn.Module, labels: Tensor) -> LabelKind:
    """How the labels lie against the logits, from the model's class and the labels' shape.

    A subclass of a transformers model is what its parent is.
    """
    base = innermost_model(model)
    names = " ".join(parent.__name__ for parent in type(base).__mro__)
    if labels.dim() < 2 or "SequenceClassification" in names or "ImageClassification" in names:
        return "sample"
    if any(part in names for part in ("TokenClassification", "MaskedLM", "PreTraining")):
        return "aligned"
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return "aligned"
    if labels.is_floating_point():
        return "sample"
    return "causal"


def has_label(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the default loss of this batch counts any label.

    Raises:
        DataError: there are no labels at all.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise DataError(
            "a batch has no tensor under 'labels', so there is no loss to take gradients of. Add "
            "labels "
            "(-100 where a token should not count), or pass loss_fn=..., a function of (model, "
            "batch) "
            "that returns one loss per sequence."
        )
    if labels.is_floating_point():
        return labels.numel() > 0
    counted = labels != IGNORED
    if labels.dim() == 2 and label_kind(model, labels) == "causal":
        counted = counted & ~packed_segments(batch, labels)[1].to(counted.device)
        counted = counted[:, 1:]
    return bool(counted.any())


def _default_loss(
    model: nn.Module, batch: Mapping[str, Any], reduction: LossReduction
) -> BatchLoss:
    labels = batch["labels"]
    kind = label_kind(model, labels)
    logits = _logits(model, batch)
    labels = labels.to(logits.device)
    if kind == "sample":
        return _sample_loss(model, logits, labels)
    _check_token_logits(model, logits, labels, kind)
    return _token_loss(logits, labels, batch, kind, reduction)


def _model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels; a decoder gets its inputs from them, as in training."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    base = innermost_model(model)
    labels = batch.get("labels")
    if (
        getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        and isinstance(labels, Tensor)
        and label_kind(model, labels) == "aligned"
        and accepts(base, "decoder_input_ids")
        and "decoder_input_ids" not in inputs
        and "decoder_inputs_embeds" not in inputs
    ):
        inputs["decoder_input_ids"] = _shifted_right(base, labels)
    if accepts(base, "use_cache"):
        inputs.setdefault("use_cache", False)
    return inputs


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    outputs = model(**_model_inputs(model, batch))
    logits = getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model's output ({type(outputs).__name__}) has no logits, so the default loss "
            "cannot "
            "be taken. Pass loss_fn=..., a function of (model, batch) that returns one loss per "
            "sequence."
        )
    return logits


def _shifted_right(base: nn.Module, labels: Tensor) -> Tensor:
    """Decoder inputs from labels, by the model's own rule, or by the one that all share."""
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        ids: Tensor = prepare(labels=labels)
        return ids
    start = getattr(base.config, "decoder_start_token_id", None)
    padding = getattr(base.config, "pad_token_id", None)
    if not isinstance(start, int) or not isinstance(padding, int):
        raise DataError(
            f"the configuration of {type(base).__name__} has no decoder_start_token_id and "
            "pad_token_id, "
            "so decoder inputs cannot be made from labels. Put 'decoder_input_ids' into the "
            "batches."
        )
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([torch.zeros_like(first, dtype=torch.bool), labels[:, :-1] == IGNORED], dim=1),
        padding,
    )


def _sample_loss(model: nn.Module, logits: Tensor, labels: Tensor) -> BatchLoss:
    """One label, or one vector of labels, a sample: classification, multi-label or regression."""
    # Half-precision logits lose digits in the softmax.
    logits = logits.to(sum_dtype(logits.dtype))
    rows = labels.shape[0] if labels.dim() else 1
    if logits.shape[0] != rows:
        raise DataError(_misfit(model, logits, labels))
    flat = logits.reshape(rows, -1)
    problem = _problem(model, flat, labels)
    if problem == "single_label_classification":
        if labels.numel() != rows:
            raise DataError(_misfit(model, logits, labels))
        losses = F.cross_entropy(
            flat, labels.reshape(-1).long(), ignore_index=IGNORED, reduction="none"
        )
        total = (labels != IGNORED).sum()
        return BatchLoss(losses, total, total)
    wanted = labels.reshape(rows, -1).to(flat.dtype)
    if wanted.shape != flat.shape:
        raise DataError(_misfit(model, logits, labels))
    if problem == "regression":
        losses = F.mse_loss(flat, wanted, reduction="none").mean(-1)
    else:
        losses = F.binary_cross_entropy_with_logits(flat, wanted, reduction="none").mean(-1)
    total = torch.tensor(rows)
    return BatchLoss(losses, total, total)


def _problem(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    """What labels mean: by the rule of transformers, for models of its kind and others."""
    base = innermost_model(model)
    config = getattr(base, "config", None)
    known = getattr(config, "problem_type", None)
    if known is not None:
        return str(known)
    if isinstance(getattr(config, "num_labels", None), int) and logits.shape[-1] > 1:
        floating = labels.is_floating_point()
        return "multi_label_classification" if floating else "single_label_classification"
    if logits.shape[-1] == 1 or labels.is_floating_point():
        return "regression"
    return "single_label_classification"


def _misfit(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    return (
        f"labels of shape {tuple(labels.shape)} do not fit the logits of "
        f"{type(innermost_model(model)).__name__}, "
        f"{tuple(logits.shape)}, in a way that the default loss knows. Pass loss_fn=..., a "
        "function of "
        "(model, batch) that returns one loss per sequence."
    )


def _check_token_logits(model: nn.Module, logits: Tensor, labels: Tensor, kind: LabelKind) -> None:
    """Refuse what would be compared at the wrong places: a transcript's labels against frames."""
    fits = labels.dim() == 2 and logits.dim() == 3 and logits.shape[0] == labels.shape[0]
    if fits and kind == "causal":
        # Models that put other tokens (an image's) in front give longer logits than labels.
        fits = logits.shape[1] >= labels.shape[1]
        fits = fits and not type(innermost_model(model)).__name__.endswith("CTC")
    elif fits:
        fits = logits.shape[1] == labels.shape[1]
    if not fits:
        raise DataError(_misfit(model, logits, labels))


def _next(entries: Tensor, last: int) -> Tensor:
    """Every position's ``(rows, length)`` entry of the position after it; `last` at the end."""
    moved = torch.full_like(entries, last)
    moved[:, :-1] = entries[:, 1:]
    return moved


def _token_loss(
    logits: Tensor,
    labels: Tensor,
    batch: Mapping[str, Any],
    kind: LabelKind,
    reduction: LossReduction,
) -> BatchLoss:
    """Cross-entropy of token labels, summed or averaged inside each sequence."""
    length = labels.shape[1]
    logits = logits[:, logits.shape[1] - length :]
    segments, starts = packed_segments(batch, labels)
    count = int(segments.max()) + 1 if segments.numel() else labels.shape[0]
    # From the host without waiting for the forward to end.
    segments = segments.to(labels.device, non_blocking=True)
    if kind == "causal":
        # A sequence's first token has nothing before it in its own sequence to be predicted from, and
        # the last one predicts nothing. Logits stay whole: a part of them would be a copy.
        labels = labels.masked_fill(starts.to(labels.device, non_blocking=True), IGNORED)
        labels, segments = _next(labels, IGNORED), _next(segments, 0)
    flat = labels.reshape(-1)
    losses = token_losses(logits.flatten(0, 1), flat)
    counted = (flat != IGNORED).to(losses.dtype)
    index = segments.reshape(-1)
    sums = losses.new_zeros(count).index_add(0, index, losses)
    tokens = losses.new_zeros(count).index_add(0, index, counted)
    if reduction == "sequence":
        sums = sums / tokens.clamp_min(1)
    return BatchLoss(sums, (tokens > 0).sum(), tokens.sum().long())
