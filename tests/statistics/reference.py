"""The statistics once more, from autograd and dense sums: the ground truth, slow and plain.

Nothing of the library is used. Every sequence's loss is differentiated by itself, with respect to
the weight and to every layer's output; sums over positions are loops over boolean masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Losses = Callable[[nn.Module, Mapping[str, Tensor]], list[Tensor | None]]
"""One loss for each sequence of a batch; None for a sequence without labels."""

Counted = Callable[[str, Mapping[str, Tensor]], Tensor | None]
"""``(rows, length)`` booleans for a layer's input in a batch; None where every position counts."""


@dataclass
class Truth:
    """Means of one layer, in the units of METHODS (per sequence, per counted position)."""

    G: Tensor
    Sx: Tensor
    mean: Tensor
    Sy: Tensor
    positions: int
    sequences: int


@dataclass
class _Sums:
    G: Any = 0.0
    Sx: Any = 0.0
    x: Any = 0.0
    Sy: Any = 0.0
    positions: int = 0
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def attention(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Positions that attend."""
    del name
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def causal(model: nn.Module, batch: Mapping[str, Tensor], total: bool = False) -> list[Any]:
    """Mean (or total) of ``-log p(label)`` over each row's labels but its first position's."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return _rows(model(**inputs).logits[:, :-1], batch["labels"][:, 1:], total)


def aligned(model: nn.Module, batch: Mapping[str, Tensor], total: bool = False) -> list[Any]:
    """The same where a label stands beside its logits: token classification."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return _rows(model(**inputs).logits, batch["labels"], total)


def sequence_to_sequence(
    model: nn.Module, batch: Mapping[str, Tensor], total: bool = False
) -> list[Any]:
    """The same for a decoder whose inputs are the labels, shifted right, -100 as padding."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    shifted = torch.cat([start, labels[:, :-1]], 1)
    inputs["decoder_input_ids"] = shifted.masked_fill(shifted == -100, model.config.pad_token_id)
    return _rows(model(**inputs).logits, labels, total)


def one_label(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Any]:
    """``-log p(label)`` of each sample."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    outputs = model(**inputs)
    logits = outputs if isinstance(outputs, Tensor) else outputs["logits"]
    return [-row.log_softmax(-1)[label] for row, label in zip(logits, batch["labels"], strict=True)]


def squared(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Any]:
    """Half the squared error of each sample, summed over outputs."""
    errors = model(x=batch["x"]) - batch["y"]
    return [0.5 * (row**2).sum() for row in errors]


def _rows(logits: Tensor, labels: Tensor, total: bool) -> list[Any]:
    losses: list[Any] = []
    for row, wanted in zip(logits, labels, strict=True):
        kept = wanted != -100
        if not kept.any():
            losses.append(None)
            continue
        chosen = -row.log_softmax(-1)[kept].gather(1, wanted[kept][:, None])
        losses.append(chosen.sum() if total else chosen.mean())
    return losses


def reference(
    model: nn.Module,
    names: Sequence[str],
    data: Sequence[Mapping[str, Tensor]],
    losses_of: Losses,
    counted: Counted = attention,
    gradient_count: float | None = None,
) -> dict[str, Truth]:
    """Truth of each named layer; the model's flags are put back.

    Args:
        model: in eval mode.
        names: layers.
        data: batches.
        losses_of: see `Losses`.
        counted: see `Counted`.
        gradient_count: what the summed gradient is divided by; the number of sequences if None.
    """
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: _Sums() for name in names}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = [module.register_forward_hook(_keeper(sums[n])) for n, module in modules.items()]
    sequences = 0
    try:
        model.requires_grad_(True)
        for batch in data:
            for entry in sums.values():
                entry.calls.clear()
            losses = [loss for loss in losses_of(model, batch) if loss is not None]
            sequences += len(losses)
            for name, module in modules.items():
                _add(sums[name], name, module, batch, losses, counted)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    divisor = sequences if gradient_count is None else gradient_count
    return {
        name: Truth(
            s.G / divisor,
            s.Sx / s.positions,
            s.x / s.positions,
            s.Sy / s.positions,
            s.positions,
            sequences,
        )
        for name, s in sums.items()
    }


def _keeper(entry: _Sums) -> Any:
    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entry.calls.append((args[0], output))

    return keep


def _add(
    entry: _Sums,
    name: str,
    module: nn.Module,
    batch: Mapping[str, Tensor],
    losses: Sequence[Tensor],
    counted: Counted,
) -> None:
    outputs = [y for _, y in entry.calls]
    weight = module.weight
    gradients = [torch.zeros_like(y) for y in outputs]
    for loss in losses:
        (slope,) = torch.autograd.grad(loss, [weight], retain_graph=True, allow_unused=True)
        of_weight = torch.zeros_like(weight) if slope is None else slope
        turned = isinstance(module, Conv1D | nn.Embedding)
        entry.G = entry.G + (of_weight.mT if turned else of_weight.flatten(1))
        # Another sequence's rows are exactly zero: the gradients of single losses can be added.
        if not outputs:
            continue
        parts = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        for total, part in zip(gradients, parts, strict=True):
            if part is not None:
                total += part
    mask = counted(name, batch)
    for (x, _), g in zip(entry.calls, gradients, strict=True):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            x, g = patches(module, x), g.flatten(2).mT
        if isinstance(module, nn.Embedding):
            x = nn.functional.one_hot(x, module.num_embeddings).to(g)
            if module.padding_idx is not None:
                x[..., module.padding_idx] = 0
            if len(x) < len(g):
                x = x.expand(len(g), *x.shape[1:])
            g = g * getattr(module, "embed_scale", 1.0)
        kept = (
            torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.view(x.shape[:-1])
        )
        rows, slopes = x.detach()[kept], g[kept]
        entry.Sx = entry.Sx + rows.mT @ rows
        entry.x = entry.x + rows.sum(0)
        entry.Sy = entry.Sy + slopes.mT @ slopes
        entry.positions += len(rows)


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """``(batch, locations, in * kernel)``: what every output location reads, one by one."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides = [n for size in reversed(module.padding) for n in (int(size), int(size))]
    x = nn.functional.pad(x, sides, mode=mode)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    starts = [
        range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, module.stride, strict=True)
    ]
    rows = []
    for corner in itertools.product(*starts):
        steps = zip(corner, reach, module.dilation, strict=True)
        window = (slice(None), slice(None), *(slice(c, c + r, d) for c, r, d in steps))
        rows.append(x[window].reshape(len(x), -1))
    return torch.stack(rows, dim=1)
