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

from lorainit.errors import DataError
from lorainit.types import LossReduction

IGNORED = -100
"""The label that counts for nothing, as everywhere in transformers."""

LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""``loss_fn(model, batch) -> (sequences,)`` losses, one for each sequence of the batch."""

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

    A user's `loss_fn` decides its own reduction inside a sequence; under ``"token"`` it should return
    sums, which are divided at the end by the labels of ``batch["labels"]`` that are not -100.
    """
    if loss_fn is None:
        return _default_loss(model, batch, reduction)
    losses = loss_fn(model, batch)
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise DataError(
            f"loss_fn must return one loss per sequence, a (sequences,) tensor; it returned {shape}. "
            "Use reduction='none' in the loss and average over each sequence's own tokens."
        )
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        tokens = (labels != IGNORED).sum()
    else:
        tokens = torch.tensor(losses.shape[0])
    return BatchLoss(losses, torch.tensor(losses.shape[0]), tokens)


def label_kind(model: nn.Module, labels: Tensor) -> LabelKind:
    """How the labels lie against the logits, from the model's class and the labels' shape."""
    config = getattr(model, "config", None)
    name = _model_class_name(model)
    if labels.dim() < 2 or "SequenceClassification" in name or "ImageClassification" in name:
        return "sample"
    if getattr(config, "is_encoder_decoder", False):
        return "aligned"
    if any(part in name for part in ("TokenClassification", "MaskedLM", "PreTraining")):
        return "aligned"
    if labels.is_floating_point():
        return "sample"
    return "causal"


def _model_class_name(model: nn.Module) -> str:
    """Class name of the innermost model: wrappers (PEFT, DDP, compile) are looked through."""
    seen = model
    if hasattr(seen, "get_base_model"):
        seen = seen.get_base_model()
    while isinstance(
        inner := getattr(seen, "module", None) or getattr(seen, "_orig_mod", None), nn.Module
    ):
        seen = inner
        if hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
    return type(seen).__name__


def _default_loss(
    model: nn.Module, batch: Mapping[str, Any], reduction: LossReduction
) -> BatchLoss:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise DataError(
            "a batch has no tensor under 'labels', so there is no loss to take gradients of. Add labels "
            "(-100 where a token should not count), or pass loss_fn=..., a function of (model, batch) "
            "that returns one loss per sequence."
        )
    kind = label_kind(model, labels)
    logits = _logits(model, batch, labels, kind)
    labels = labels.to(logits.device)
    if kind == "sample":
        return _sample_loss(model, logits, labels)
    return _token_loss(logits, labels, batch, kind, reduction)


def _logits(model: nn.Module, batch: Mapping[str, Any], labels: Tensor, kind: LabelKind) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and kind == "aligned":
        if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
            inputs["decoder_input_ids"] = _shifted_right(model, labels)
    if hasattr(config, "use_cache"):
        inputs.setdefault("use_cache", False)
    outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
    if isinstance(logits, tuple):
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model's output ({type(outputs).__name__}) has no logits, so the default loss cannot "
            "be taken. Pass loss_fn=..., a function of (model, batch) that returns one loss per sequence."
        )
    return logits


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """Decoder inputs from labels, by the model's own rule."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    prepare = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        raise DataError(
            f"{type(base).__name__} has no prepare_decoder_input_ids_from_labels, so decoder inputs "
            "cannot be made from labels. Put 'decoder_input_ids' into the batches."
        )
    ids: Tensor = prepare(labels=labels)
    return ids


def _sample_loss(model: nn.Module, logits: Tensor, labels: Tensor) -> BatchLoss:
    """One label, or one vector of labels, a sample: classification, multi-label or regression."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    # Half-precision logits lose digits in the softmax; wider ones stay as they are.
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    rows = logits.shape[0]
    if problem == "regression" or (
        problem is None
        and labels.is_floating_point()
        and labels.dim() <= 2
        and logits.reshape(rows, -1).shape[-1] == labels.reshape(rows, -1).shape[-1]
        and problem != "multi_label_classification"
    ):
        error = F.mse_loss(
            logits.reshape(rows, -1), labels.reshape(rows, -1).to(logits.dtype), reduction="none"
        )
        losses = error.mean(-1)
        counted = torch.ones(rows, dtype=torch.bool, device=logits.device)
    elif problem == "multi_label_classification":
        error = F.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )
        losses = error.mean(-1)
        counted = torch.ones(rows, dtype=torch.bool, device=logits.device)
    else:
        flat = labels.reshape(-1)
        losses = F.cross_entropy(
            logits.reshape(flat.shape[0], -1), flat, ignore_index=IGNORED, reduction="none"
        )
        counted = flat != IGNORED
    total = counted.sum()
    return BatchLoss(losses, total, total)


def _token_loss(
    logits: Tensor,
    labels: Tensor,
    batch: Mapping[str, Any],
    kind: LabelKind,
    reduction: LossReduction,
) -> BatchLoss:
    """Cross-entropy of token labels, summed or averaged inside each sequence."""
    rows, length = labels.shape
    if logits.shape[1] > length:
        # Models that put other tokens (an image's) in front give longer logits than labels.
        logits = logits[:, -length:]
    segments, starts = packed_segments(batch, labels)
    segments = segments.to(labels.device)
    if kind == "causal":
        # A sequence's first token has nothing before it in its own sequence to be predicted from.
        labels = labels.masked_fill(starts.to(labels.device), IGNORED)
        logits, labels, segments = logits[:, :-1], labels[:, 1:], segments[:, 1:]
    flat = labels.reshape(-1)
    logits = logits.reshape(flat.shape[0], -1)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    losses = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="none")
    counted = (flat != IGNORED).to(losses.dtype)
    count = int(segments.max()) + 1 if rows else 0
    index = segments.reshape(-1)
    sums = losses.new_zeros(count).index_add(0, index, losses)
    tokens = losses.new_zeros(count).index_add(0, index, counted)
    if reduction == "sequence":
        sums = sums / tokens.clamp_min(1)
    return BatchLoss(sums, (tokens > 0).sum(), tokens.sum().long())


def packed_segments(batch: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each position belongs to, and where sequences after a row's first start.

    One row is one sequence, unless the batch says that rows are packed: by ``position_ids`` that
    return to zero, by ``seq_idx``, or by ``cu_seq_lens_q`` (one row).

    Returns:
        ``(rows, length)`` integers counting from zero through the batch, and a boolean
        ``(rows, length)``, both on the CPU unless the batch says otherwise.
    """
    rows, length = labels.shape
    starts = torch.zeros(rows, length, dtype=torch.bool)
    position_ids = batch.get("position_ids")
    if isinstance(batch.get("seq_idx"), Tensor) and batch["seq_idx"].shape == labels.shape:
        index = batch["seq_idx"].cpu()
        starts[:, 1:] = index[:, 1:] != index[:, :-1]
    elif isinstance(batch.get("cu_seq_lens_q"), Tensor) and rows == 1:
        bounds = batch["cu_seq_lens_q"].cpu().long()
        starts[0, bounds[(bounds > 0) & (bounds < length)]] = True
    elif isinstance(position_ids, Tensor) and position_ids.shape == labels.shape:
        starts = position_ids.cpu() == 0
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            starts &= mask.cpu().bool()
        # The first start of a row is the row's own.
        starts &= starts.cumsum(dim=1) > 1
    within = starts.long().cumsum(dim=1)
    per_row = within[:, -1] + 1 if length else torch.ones(rows, dtype=torch.long)
    offsets = per_row.cumsum(0) - per_row
    return within + offsets.unsqueeze(1), starts
