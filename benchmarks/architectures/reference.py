"""The truth, without this project: autograd of the model's own loss, and what its layers read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.architectures.tiny.text import FIRST, LAST

Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """Sums over rows that ran alone, by the layer's name.

    Attributes:
        gradients: ``(out, in)``, of the model's own losses; None where autograd gave none.
        inputs: ``(in, in)``, second moments of what linear layers read in calls that the loss depends on; none
            of stacked experts.
        unpadded: the same over as many positions as the row has tokens, of layers that read more: some models
            pad their rows themselves.
        outputs: ``(out, out)``, of gradients with respect to what they gave.
        loss: the sum of the losses.
    """

    gradients: dict[str, Tensor | None]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    unpadded: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0


def reference(model: nn.Module, rows: Sequence[Row], names: Iterable[str]) -> Reference:
    """Run each row by itself, in eval mode, and add up.

    Args:
        model: weights that its layers share are untied, and all but these layers' are frozen, as in PEFT:
            there are models whose gradients depend on that.
        rows: batches of one, with labels.
        names: of linear layers, or of experts as ``module.parameter.index``.
    """
    names = list(names)
    inputs: dict[str, Tensor] = {}
    unpadded: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles, length = [], [0]
    block = getattr(model.config, "block_size", 0) or 0

    def watched(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if output.requires_grad:
                output.register_hook(lambda gradient: add(given.detach(), gradient))

        def add(given: Tensor, gradient: Tensor) -> None:
            inputs[name] = inputs.get(name, 0) + _second_moment(given)
            unpadded[name] = unpadded.get(name, 0) + _second_moment(_own(given, length[0], block))
            outputs[name] = outputs.get(name, 0) + _second_moment(gradient)

        return hook

    linear = {name: module for name in names if (module := _module(model, name)) is not None}
    for name, module in linear.items():
        handles.append(module.register_forward_hook(watched(name), with_kwargs=True))
    _untie(model, linear.values())
    _train_alone(model, names)
    model.zero_grad(set_to_none=True)
    total = 0.0
    try:
        for row in rows:
            ids = row.get("input_ids")
            length[0] = ids.shape[1] if isinstance(ids, Tensor) else 0
            loss = own_loss(model, row)
            loss.backward()
            total += float(loss)
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: _gradient(model, name) for name in names}
    model.zero_grad(set_to_none=True)
    return Reference(gradients, inputs, unpadded, outputs, total)


def _train_alone(model: nn.Module, names: Iterable[str]) -> None:
    """Weights of these layers require gradients, and no others."""
    model.requires_grad_(False)
    for name in names:
        module = _module(model, name)
        if module is None:
            path = name.rpartition(".")[0]
            owner, _, parameter = path.rpartition(".")
            getattr(model.get_submodule(owner), parameter).requires_grad_(True)
        elif module.weight.is_floating_point():
            module.weight.requires_grad_(True)


def _untie(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Give each layer a weight of its own: PEFT adapts two layers that share one by an adapter each."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter) and owners[id(weight)] > 1:
            layer.weight = nn.Parameter(weight.detach().clone())


def reads_no_data(model: nn.Module, row: Row, names: Iterable[str]) -> set[str]:
    """Layers whose input is the same whatever the data say: tables of relative positions, say."""
    first, second = (_read(model, some, names) for some in (row, _other(row)))
    return {name for name in first if name in second and torch.equal(first[name], second[name])}


@torch.no_grad()
def _read(model: nn.Module, row: Row, names: Iterable[str]) -> dict[str, Tensor]:
    """What each linear layer read last."""
    found: dict[str, Tensor] = {}
    handles = []

    def keeping(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
            found[name] = (args[0] if args else next(iter(kwargs.values()))).detach().clone()

        return hook

    for name in names:
        if (module := _module(model, name)) is not None:
            handles.append(module.register_forward_hook(keeping(name), with_kwargs=True))
    try:
        own_loss(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _other(row: Row) -> Row:
    """A row as long, with other words, images or sounds."""
    generator = torch.Generator().manual_seed(7)
    other = dict(row)
    for key, value in row.items():
        if value.is_floating_point():
            other[key] = value + torch.randn(value.shape, generator=generator)
        elif key == "labels" or key.endswith("input_ids"):
            words = (value >= FIRST) & (value < LAST)
            moved = FIRST + (value - FIRST + 7) % (LAST - FIRST)
            other[key] = torch.where(words, moved, value)
    return other


def own_loss(model: nn.Module, row: Row) -> Tensor:
    """What the model says its loss is."""
    torch.manual_seed(0)
    loss: Tensor = model(**row).loss
    return loss.sum()


def logits_of(model: nn.Module, row: Row) -> Tensor:
    """The model's main output, without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**row)
    for key in ("logits", "start_logits", "lm_logits", "prediction_logits"):
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(found, tuple | list):
            found = found[0]
        if isinstance(found, Tensor):
            return found.clone()
    tensors = [value for value in output.values() if isinstance(value, Tensor) and value.dim() > 1]
    return tensors[0].clone()


def _own(x: Tensor, length: int, block: int) -> Tensor:
    """The positions of the row's tokens in ``(1, positions, in)`` or ``(positions, 1, in)``.

    They are the first ones, but where blocks of positions are staggered by half a block. All where there
    are no tokens, or no more positions.
    """
    if x.dim() != 3 or not length:
        return x
    x = x.transpose(0, 1) if x.shape[1] == 1 else x
    staggered = block and x.shape[1] > -(-length // block) * block
    first = block // 2 if staggered else 0
    return x[:, first : first + length]


def _second_moment(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1, x.shape[-1]).double()
    return flat.T @ flat


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """A linear layer; None for an expert of a stack."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _gradient(model: nn.Module, name: str) -> Tensor | None:
    module = _module(model, name)
    if module is not None:
        gradient = getattr(module.weight, "grad", None)
        turned = isinstance(module, Conv1D)
    else:
        path, index = name.rsplit(".", 1)
        owner = model.get_submodule(path.rpartition(".")[0])
        stacked = getattr(owner, path.rpartition(".")[2]).grad
        gradient = None if stacked is None else stacked[int(index)]
        turned = bool(getattr(owner, "is_transposed", False))
    if gradient is None:
        return None
    return (gradient.mT if turned else gradient).detach().clone()
