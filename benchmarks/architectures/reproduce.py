"""Does a model fail in the same way without this project? Plain calls of it, each tried alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks.architectures.numbers import TOLERANCE, distance
from benchmarks.architectures.reference import Row, logits_of, own_loss
from benchmarks.architectures.starts import stock

_ALIKE = 60
"""Characters of a message that have to be the same."""


def reproduced(
    model: nn.Module, config: LoraConfig, rows: list[Row], data: list[Row], error: BaseException
) -> str | None:
    """Which plain use of the model raises what a start raised; None: none of them."""
    for what, use in _uses(model, config, rows, data):
        try:
            use()
        except Exception as other:
            if type(other) is type(error) and str(other)[:_ALIKE] == str(error)[:_ALIKE]:
                return what
        finally:
            model.zero_grad(set_to_none=True)
    return None


def depends_on_padding(model: nn.Module, rows: list[Row], batch: Row) -> float:
    """How far a row's outputs alone are from its outputs beside others, relative; labels left out too."""
    worst = 0.0
    together = logits_of(model, batch)
    if len(together) != len(rows):
        return float("nan")
    for i, row in enumerate(rows):
        alone, beside = logits_of(model, row), together[i : i + 1]
        if alone.dim() >= 3 and alone.shape[1] < beside.shape[1]:
            beside = beside[:, : alone.shape[1]]
        if alone.shape != beside.shape:
            return float("nan")
        worst = max(worst, distance(beside, alone))
    return worst


def depends_on_chance(model: nn.Module, row: Row) -> bool:
    """Whether two runs of the model, in eval mode and from one seed or two, differ."""
    first = logits_of(model, row)
    with torch.no_grad():
        torch.manual_seed(1)
        output = model(**row)
    loss = output.loss
    again = own_loss(model, row).detach()
    return not torch.equal(first, logits_of(model, row)) or distance(loss, again) > TOLERANCE


def depends_on_what_is_frozen(model: nn.Module, row: Row) -> bool:
    """Whether autograd gives linear layers other gradients when all else is frozen, as PEFT does."""
    some = copy.deepcopy(model)
    weights = [m.weight for m in some.modules() if isinstance(m, nn.Linear)]
    found = []
    for trained in (list(some.parameters()), weights, weights[:1]):
        some.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(weight.is_floating_point())
        some.zero_grad(set_to_none=True)
        own_loss(some, row).backward()
        found.append([None if w.grad is None else w.grad.clone() for w in weights])
    return any(
        one is not None and other is not None and distance(other, one) > TOLERANCE
        for others in found[1:]
        for one, other in zip(found[0], others, strict=True)
    )


def gradients_are_finite(model: nn.Module, rows: list[Row]) -> bool:
    """By autograd of the model's own loss."""
    model.zero_grad(set_to_none=True)
    try:
        for row in rows:
            own_loss(model, row).backward()
        return all(
            bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None
        )
    finally:
        model.zero_grad(set_to_none=True)


def _uses(
    model: nn.Module, config: LoraConfig, rows: list[Row], data: list[Row]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    def without(batch: Row) -> Row:
        return {key: value for key, value in batch.items() if key != "labels"}

    def frozen() -> None:
        some = copy.deepcopy(model).requires_grad_(False)
        for module in some.modules():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(True)
        own_loss(some, rows[0]).backward()

    yield "model(**batch).loss.backward()", lambda: own_loss(model, data[0]).backward()
    yield (
        "peft.get_peft_model(model)(**batch).loss.backward()",
        lambda: stock(model, data[0], config),
    )
    yield "model(**row) without labels", lambda: model(**without(rows[0]))
    yield "model(**batch) without labels", lambda: model(**without(data[0]))
    yield "model(**row).loss.backward(), only linear weights trained", frozen
