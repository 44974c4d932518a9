"""Each of four methods on a copy of a model, with no argument but the data, and what must hold afterwards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as stock_peft_model
from torch import Tensor, nn

import lorainit
from benchmarks.architectures.reference import Row, logits_of, own_loss
from lorainit.types import Method

_REFUSED = ("out_proj", "conv1d")
METHODS: dict[str, Callable[[], Method | None]] = {
    "default": lambda: None,
    "LoRA-DA": lorainit.LoraDA,
    "FILet": lorainit.FILet,
    "EVA": lorainit.EVA,
}


def fitting_config(model: nn.Module, row: Row) -> tuple[LoraConfig, str]:
    """The widest configuration under which stock PEFT and the model run, and what it targets, in words.

    All linear layers, or all but those whose forward is not a linear layer's and those that PEFT refuses
    for state space models.

    Raises:
        Exception: whatever PEFT or the model raises under the first.
    """
    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    ]
    refused = rf"(.*\.)?({'|'.join(_REFUSED)})"
    choices = [
        ("all-linear", None),
        ("all-linear but out_proj", refused),
        ("all-linear but layers with a forward of their own", odd),
        ("all-linear but both", "|".join([refused, *map(re.escape, odd)])),
    ]
    first: Exception | None = None
    for words, left_out in choices:
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=left_out
        )
        try:
            stock(model, row, config)
        except Exception as error:
            first = first or error
            continue
        return config, words
    assert first is not None
    raise first


def stock(model: nn.Module, row: Row, config: LoraConfig) -> PeftModel:
    """The model with PEFT's own adapter; its backward has run.

    Raises:
        Exception: whatever PEFT or the model raises.
    """
    adapted = stock_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    own_loss(adapted, row).backward()
    return adapted


def adapted_layers(model: nn.Module) -> set[str]:
    """Names of layers that have an adapter, without what single adapters call their parts."""
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def start(
    model: nn.Module, config: LoraConfig, method: Method | None, data: list[Row]
) -> PeftModel:
    """The documented call."""
    return lorainit.get_peft_model(
        model, config, method=method, data=[dict(batch) for batch in data]
    )


def faults(
    adapted: PeftModel, before: dict[str, Tensor], logits: Tensor, row: Row, beside: PeftModel
) -> Iterator[str]:
    """What is not as it has to be after a start, in words.

    Args:
        adapted: what a start returned.
        before: the base's parameters, cloned before it.
        logits: the base's, of `row`.
        beside: the model with stock PEFT's adapter.
    """
    adapted.eval()
    now = {name: p for name, p in _base_parameters(adapted).items() if name in before}
    changed = [name for name, p in now.items() if not torch.equal(p, before[name])]
    if changed or len(now) < len(before):
        missing = [name for name in before if name not in now]
        yield f"base weights changed: {', '.join([*changed, *missing][:3])}"
    bad = [n for n, p in adapted.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        yield f"not finite: {', '.join(bad[:3])}"
    if lacking := adapted_layers(beside) - adapted_layers(adapted):
        yield f"not adapted, as stock PEFT does: {', '.join(sorted(lacking)[:3])}"
    with adapted.disable_adapter(), beside.disable_adapter():
        disabled = logits_of(adapted, row)
        # Stock PEFT's wrappers alone can change the last digit.
        if not torch.equal(disabled, logits) and not torch.equal(disabled, logits_of(beside, row)):
            yield "the disabled adapter is not the base"
    loss = own_loss(adapted, row)
    if not bool(torch.isfinite(loss)):
        yield "the loss after the start is not finite"
        return
    loss.backward()
    if not any(p.grad is not None for p in adapted.parameters() if p.requires_grad):
        yield "nothing trains"


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _base_parameters(adapted: PeftModel) -> dict[str, Tensor]:
    """The base's parameters by their names before PEFT wrapped them."""
    found = {}
    for name, parameter in adapted.get_base_model().named_parameters():
        if ".lora_" not in name:
            found[name.replace(".base_layer", "")] = parameter
    return found
