"""Heads that PEFT trains in full beside an adapter: which there are, and where their own copies lie."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from lorainit.adapters.targets import base_model_of
from lorainit.errors import AdapterError
from lorainit.models.heads import Values

MOST_OUTPUTS = 4096
"""Wider heads are those of language models, over a vocabulary: they are left as they are."""

_ADDED = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to ``modules_to_save`` by itself, by task type."""


@dataclass(frozen=True, eq=False)
class Head:
    """The last linear layer of a module that PEFT trains a copy of.

    Attributes:
        saved: name of that module in the base model.
        inner: name of the layer inside it; empty where it is the module itself.
        module: the base model's own layer, which runs while adapters are off.
        weight: ``(out, in)`` of the adapter's copy as it is; of one that does not exist yet, the base's.
        bias: ``(out,)``, or None.
    """

    saved: str
    inner: str
    module: nn.Linear
    weight: Tensor
    bias: Tensor | None

    @property
    def name(self) -> str:
        """Dotted name in the base model."""
        return f"{self.saved}.{self.inner}" if self.inner else self.saved

    @property
    def differs(self) -> bool:
        """Whether the adapter's copy has other values than the base's layer."""
        return not _equal(self.weight, self.module.weight) or not _equal(
            self.bias, self.module.bias
        )


def heads_of(
    model: nn.Module,
    config: LoraConfig,
    adapter_name: str,
    targets: Collection[str],
    *,
    existing: bool,
) -> dict[str, Head]:
    """The heads that can be fitted, by name.

    Left out are heads wider than `MOST_OUTPUTS`, those that are no plain linear layers or are offloaded,
    targets of the adapter itself, and those of an adapter that exists whose copy differs from the base in
    more than its last layer: what reaches that layer is not what the base model computes.

    Args:
        model: a base model, or a PeftModel.
        config: of the adapter; PEFT's own additions by its task type are taken into account.
        adapter_name: of the adapter.
        targets: names of the layers that get factors.
        existing: whether it is there already.
    """
    base = base_model_of(model)
    wanted = set(config.modules_to_save or ())
    wanted |= set(_ADDED.get(str(getattr(config.task_type, "value", config.task_type)), ()))
    found: dict[str, Head] = {}
    inside: list[str] = []
    for name, module in base.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        if wrapped or name.endswith(tuple(wanted)):
            inside.append(name + ".")
            head = _head(name, module, adapter_name, existing=existing)
            if head is not None and head.name not in targets and name.endswith(tuple(wanted)):
                found[head.name] = head
    return found


def _head(name: str, module: nn.Module, adapter_name: str, *, existing: bool) -> Head | None:
    original, own = module, module
    if isinstance(module, ModulesToSaveWrapper):
        original = own = module.original_module
        if existing:
            if adapter_name not in module.modules_to_save:
                return None
            own = module.modules_to_save[adapter_name]
    elif existing or isinstance(module, AuxiliaryTrainingWrapper):
        return None
    layers = [(n, m) for n, m in original.named_modules() if type(m) is nn.Linear]
    if not layers:
        return None
    inner, layer = layers[-1]
    weight = layer.weight
    served = weight.is_floating_point() and weight.element_size() >= 2 and not weight.is_meta
    if not served or hasattr(weight, "device_mesh") or layer.out_features > MOST_OUTPUTS:
        return None
    copy = own.get_submodule(inner)
    assert isinstance(copy, nn.Linear)
    others = {f"{inner}.weight".lstrip("."), f"{inner}.bias".lstrip(".")}
    before = dict(original.named_parameters())
    if own is not original and any(
        not _equal(p, before.get(n)) for n, p in own.named_parameters() if n not in others
    ):
        return None
    bias = None if copy.bias is None else copy.bias.detach()
    return Head(name, inner, layer, copy.weight.detach(), bias)


@contextlib.contextmanager
def written(
    model: nn.Module, adapter_name: str, heads: Mapping[str, Head], values: Values
) -> Iterator[None]:
    """Write values into the adapter's own copies of heads; taken back if the block fails.

    Raises:
        AdapterError: PEFT made no copy of a head.
    """
    base = base_model_of(model)
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        for name, (weight, bias) in values.items():
            own = _own(base, heads[name], adapter_name)
            with torch.no_grad():
                for parameter, value in ((own.weight, weight), (own.bias, bias)):
                    if parameter is not None and value is not None:
                        undo.append((parameter, parameter.detach().clone()))
                        parameter.copy_(value)
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, before in undo:
                parameter.copy_(before)
        raise


def _own(base: nn.Module, head: Head, adapter_name: str) -> nn.Linear:
    wrapper = base.get_submodule(head.saved)
    copies = getattr(wrapper, "modules_to_save", {})
    if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in copies:
        raise AdapterError(
            f"PEFT made no copy of '{head.saved}' for adapter '{adapter_name}', so what was fitted for it "
            "has no place. Pass fit_heads=False."
        )
    own = copies[adapter_name].get_submodule(head.inner)
    assert isinstance(own, nn.Linear)
    return own


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first.detach(), second.detach().to(first))
