"""What takes the place of PEFT's start in its own tests: starts of this project, and two controls.

| kind | a start with `init_lora_weights=True` | with `False`, PEFT's random one |
|---|---|---|
| `stock` | PEFT's | PEFT's |
| `anchored` | PiSSA | PiSSA, and the trained halves moved as far as PEFT draws them |
| `unanchored` | Vanilla (zero B) | a displaced start of the same size |
| `same-numbers` | as `anchored`, but a plain adapter of rank 2r, half of it without gradient | the same |
| `twice-the-rank` | PEFT's, of rank 2r | the same |

The controls tell what a failure comes from: `same-numbers` has none of this project's classes left, and
`twice-the-rank` nothing of this project at all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

import lorainit
from lorainit.adapters.anchor import AnchoredFactor, note_sizes, take_anchor
from lorainit.adapters.layers import adapter_layers
from lorainit.adapters.patterns import scale_ranks
from lorainit.errors import LorainitError
from lorainit.types import Factors

KINDS = ("stock", "anchored", "unanchored", "same-numbers", "twice-the-rank")


@dataclass(frozen=True)
class Displaced:
    """Both factors drawn as PyTorch draws a linear layer's weight, as PEFT leaves them under `False`."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, weight: Tensor, statistics: Any, rank: int, scaling: float) -> Factors:
        *batch, rows, columns = weight.shape
        a, b = torch.empty(*batch, rank, columns), torch.empty(*batch, rows, rank)
        for factor in (a, b):
            nn.init.uniform_(factor, -(factor.shape[-1] ** -0.5), factor.shape[-1] ** -0.5)
        return Factors(a.to(weight.device), b.to(weight.device))


class Replacement:
    """Puts its kind of start in the place of PEFT's wherever a test makes an adapter.

    Attributes:
        counts: of the present test: adapters that were ``started``, or ``refused`` by an error of this
            project, which then keep PEFT's start.
        reasons: of the refusals, the first line of each.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self._loading = False

    def begin(self) -> None:
        self.counts.clear()
        self.reasons.clear()

    def install(self) -> None:
        """Wrap PEFT's functions; to be called before a test module imports them."""
        made = self._around(peft.get_peft_model, config="peft_config")
        peft.get_peft_model = peft.mapping_func.get_peft_model = made
        injected = self._around(peft.inject_adapter_in_model, config="peft_config")
        peft.inject_adapter_in_model = peft.mapping.inject_adapter_in_model = injected
        PeftModel.add_adapter = self._around(PeftModel.add_adapter, config="peft_config")
        for name in ("from_pretrained", "load_adapter"):
            setattr(PeftModel, name, self._as_loading(vars(PeftModel)[name]))

    @contextlib.contextmanager
    def _load(self) -> Iterator[None]:
        before, self._loading = self._loading, True
        try:
            yield
        finally:
            self._loading = before

    def _as_loading(self, function: Any) -> Any:
        plain = function.__func__ if isinstance(function, classmethod) else function

        @functools.wraps(plain)
        def loading(*args: Any, **kwargs: Any) -> Any:
            with self._load():
                return plain(*args, **kwargs)

        return classmethod(loading) if isinstance(function, classmethod) else loading

    def _around(self, function: Callable[..., Any], config: str) -> Callable[..., Any]:
        import inspect

        signature = inspect.signature(function)

        @functools.wraps(function)
        def making(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            lora = given.get(config)
            loads = self._loading or given.get("low_cpu_mem_usage") or given.get("state_dict")
            plain = type(lora) is not LoraConfig or lora.init_lora_weights not in (True, False)
            if self.kind == "stock" or loads or plain or given.get("mixed"):
                return function(*args, **kwargs)
            if self.kind == "twice-the-rank":
                given[config] = lora = copy.deepcopy(lora)
                scale_ranks(lora, 2)
                self.counts["started"] += 1
            with self._load():  # one that calls another is one start
                model = function(*bound.args, **bound.kwargs)
            model = given["self"] if model is None else model
            if self.kind != "twice-the-rank":
                self._start(model, given["adapter_name"], bool(lora.init_lora_weights))
            return None if "self" in given else model

        return making

    def _start(self, model: nn.Module, name: str, identity: bool) -> None:
        method: Any = lorainit.PiSSA()
        if self.kind == "unanchored":
            method = lorainit.Vanilla() if identity else Displaced()
        drawn = _drawn(model, name)
        try:
            lorainit.get_peft_model(model, None, method=method, adapter_name=name, progress=False)
        except LorainitError as error:
            self.counts["refused"] += 1
            self.reasons.append(str(error).splitlines()[0])
            return
        self.counts["started"] += 1
        if not identity:
            _move(drawn)
        if self.kind == "same-numbers":
            as_plain(model, name)


def _drawn(model: nn.Module, name: str) -> list[tuple[Any, Tensor]]:
    """PEFT's factors of an adapter, and what was drawn for them; of embeddings the parameters."""
    found: list[tuple[Any, Tensor]] = []
    for layer in adapter_layers(model, name).values():
        holders = layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B
        for factor in (holder[name] for holder in holders if name in holder):
            value = factor if isinstance(factor, nn.Parameter) else factor.weight
            if not value.is_meta:
                found.append((factor, value.detach().clone()))
    return found


@torch.no_grad()
def _move(drawn: list[tuple[Any, Tensor]]) -> None:
    """Anchored factors by as much as was drawn; an embedding's are what was drawn, of its own size."""
    for factor, value in drawn:
        if isinstance(factor, AnchoredFactor):
            factor.trained.add_(value.to(factor.trained))
        elif isinstance(factor, nn.Parameter):
            factor.copy_(value)


def as_plain(model: nn.Module, name: str) -> None:
    """Store an anchored adapter as PEFT would store one of rank 2r, and forget where it came from.

    The half that was frozen gets no gradient.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for holder in (layer.lora_A, layer.lora_B):
            for factor in [holder[name]] if name in holder else []:
                if isinstance(factor, AnchoredFactor):
                    whole, held = factor.joined().detach(), factor.trained
                    learns = factor.join(torch.ones_like(held), torch.zeros_like(held)).detach()
                    take_anchor(factor)
                    factor.weight = nn.Parameter(whole, held.requires_grad)
                    if held.requires_grad:
                        factor.weight.register_hook(learns.mul)
                    note_sizes(factor, whole.shape)
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, LoraModel):
        tuner.__class__ = LoraModel
    config = model.peft_config[name]
    config.__class__ = LoraConfig
    config.__dict__.pop("origin", None)
