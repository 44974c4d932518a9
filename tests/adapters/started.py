"""Started adapters on every kind of layer, and in float64 what they must compute: W + s (B A - B0 A0)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import lorainit

KINDS = ("linear", "Conv1D", "expert", "quantized", "tied")
STARTS = ("zero-B", "displaced", "anchored")
SCALING = 2.0
RANK = 3
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "Conv1D": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "expert": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "quantized": {"target_modules": ["q_proj", "down_proj"]},
    "tied": {"target_modules": ["q_proj", "lm_head"]},
}
_SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (4, 5), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids}


def lora(kind: str, rank: int = RANK, **changes: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=int(SCALING * rank), **(TARGETS[kind] | changes))


def base(kind: str) -> Any:
    """A base model of one layer, the same each time."""
    return copy.deepcopy(_base(kind))


@functools.cache
def _base(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "Conv1D":
            without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
            ends = {"bos_token_id": 1, "eos_token_id": 2}
            model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **without, **ends))
        elif kind == "expert":
            model = MixtralForCausalLM(
                MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)
            )
        else:
            model = LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=kind == "tied"))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    if kind == "quantized":
        import bitsandbytes as bnb

        for name in [n for n, m in model.named_modules() if n.endswith("proj")]:
            old = model.get_submodule(name)
            new = bnb.nn.Linear4bit(
                old.in_features,
                old.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            new.weight = bnb.nn.Params4bit(
                old.weight.detach().clone(), requires_grad=False, quant_type="nf4"
            )
            # On some CPUs an evaluation packs the layer, which these are too small for.
            new.support_avx512bf16_for_cpu = False
            model.set_submodule(name, new.to("cpu"))
        model.is_loaded_in_4bit = True  # as from_pretrained does; PEFT goes by it
    return model.eval()


@functools.cache
def reference(kind: str) -> Any:
    """The base model in float64, with the weights that its forward multiplies by."""
    model = _base(kind)
    if kind == "quantized":
        import bitsandbytes as bnb

        plain: Any = copy.deepcopy(_base("linear")).double()
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = module.weight
                whole = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
                plain.get_submodule(name).weight.data.copy_(whole)
        return plain
    model = copy.deepcopy(model).double()
    if kind == "expert":
        model.set_experts_implementation("eager")  # grouped products take no float64
    return model


@dataclass(frozen=True)
class Given:
    """Drawn factors as a method: nothing is measured."""

    start: str
    seed: int
    needs: ClassVar[frozenset[str]] = frozenset()

    def solve(self, weight: Tensor, statistics: Any, rank: int, scaling: float) -> Any:
        *batch, rows, columns = weight.shape
        generator = torch.Generator().manual_seed(self.seed + rows + 100 * columns)
        a = 0.3 * torch.randn(*batch, rank, columns, generator=generator)
        b = 0.3 * torch.randn(*batch, rows, rank, generator=generator)
        b = torch.zeros_like(b) if self.start == "zero-B" else b
        return lorainit.Factors(a, b, anchored=self.start == "anchored")


Pairs = dict[str, tuple[Tensor, Tensor]]


def paths(model: nn.Module, adapter: str) -> dict[str, str]:
    """By the name of the base model's weight, that of its factors, with ``{}`` for A or B."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            last = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            found[f"{own}.{last}"] = f"{name}.lora_{{}}.{adapter}.weight"
    return found


def pairs(model: nn.Module, adapter: str) -> Pairs:
    """The trained factors by the name of the base model's weight, as ``named_parameters`` has them."""
    parameters = dict(model.named_parameters())
    found = {}
    for own, path in paths(model, adapter).items():
        a, b = (parameters[path.format(side)].detach().double().clone() for side in "AB")
        found[own] = (a, b)
    return found


def product(kind: str, name: str, a: Tensor, b: Tensor) -> Tensor:
    """``s B A`` as a change of the base model's weight of that name."""
    weight = reference(kind).get_parameter(name)
    if weight.dim() == 2:
        out = b @ a
        owner = reference(kind).get_submodule(name.rpartition(".")[0])
        return SCALING * (out.T if isinstance(owner, Conv1D) else out)
    # PEFT: experts outside in A, inside in B.
    experts = len(weight)
    each = []
    for e in range(experts):
        rank = len(a) // experts
        out = b[:, e::experts] @ a[e * rank : (e + 1) * rank]
        each.append(out if out.shape == weight.shape[1:] else out.T)
    return SCALING * torch.stack(each)


def stacked(kind: str, first: Tensor, second: Tensor, side: str, name: str) -> Tensor:
    """Two halves as a factor of PEFT's of twice the rank."""
    weight = reference(kind).get_parameter(name)
    experts = len(weight) if weight.dim() == 3 else 1
    if side == "A":
        parts = zip(first.chunk(experts), second.chunk(experts), strict=True)
        return torch.cat([half for pair in parts for half in pair])
    return torch.cat([first, second], dim=1)


@dataclass(frozen=True)
class Case:
    """A model with a started and trained adapter or two.

    Attributes:
        kind: of its layers.
        start: of its adapters.
        model: the PeftModel.
        changes: by adapter, the change of every weight.
        begun: the same at the start.
    """

    kind: str
    start: str
    model: Any
    changes: Mapping[str, Mapping[str, Tensor]]
    begun: Mapping[str, Mapping[str, Tensor]]
    ranks: tuple[int, ...]
    trained: Mapping[str, Pairs] = field(default_factory=dict)
    starts: Mapping[str, Pairs] = field(default_factory=dict)

    def dense(self, *adapters: str, rows: Any = slice(None)) -> Tensor:
        """The logits of the base model with the changes of these adapters."""
        return self.dense_of([self.changes[name] for name in adapters])[rows]

    def dense_of(self, changes: Any) -> Tensor:
        with torch.no_grad():
            return functional_call(
                reference(self.kind),
                self.weights(changes),
                kwargs=inputs(),
                tie_weights=False,
            ).logits

    def weights(self, changes: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for change in changes:
            for name, delta in change.items():
                before = found.get(name, reference(self.kind).get_parameter(name))
                found[name] = before + delta
        return found

    def fresh(self) -> Any:
        """Another copy of the base model."""
        return base(self.kind)

    def started(self, seed: int = 50, name: str = "default") -> PeftModel:
        """Another start, of the first adapter's rank."""
        return _start(self.fresh(), self.kind, self.start, name, seed, self.ranks[0])


def build(kind: str, start: str, ranks: tuple[int, ...] = (RANK,)) -> Case:
    case = _build(kind, start, ranks)
    return replace(case, model=copy.deepcopy(case.model))


NAMES = ("default", "second")


def _start(
    model: Any, kind: str, start: str, name: str, seed: int, rank: int, **changes: Any
) -> Any:
    return lorainit.get_peft_model(
        model,
        lora(kind, rank, **changes),
        method=Given(start, seed),
        adapter_name=name,
        progress=False,
    )


@functools.cache
def _build(kind: str, start: str, ranks: tuple[int, ...]) -> Case:
    model, starts = base(kind), {}
    for index, (name, rank) in enumerate(zip(NAMES, ranks, strict=False)):
        model = _start(model, kind, start, name, 10 * index, rank)
        starts[name] = pairs(model, name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.set_adapter("default")
    trained = {name: pairs(model, name) for name in starts}
    changes, begun = {}, {}
    for name in starts:
        now, then = (
            {key: product(kind, key, *pair) for key, pair in of[name].items()}
            for of in (trained, starts)
        )
        if start == "anchored":
            changes[name] = {key: now[key] - then[key] for key in now}
            begun[name] = {key: torch.zeros_like(then[key]) for key in then}
        else:
            changes[name], begun[name] = now, then
    return Case(kind, start, model.eval(), changes, begun, ranks, trained, starts)


def twin(case: Case) -> Case:
    """The same numbers in plain adapters of PEFT's, which nothing of this project has made."""
    model = case.fresh()
    twice = 2 if case.start == "anchored" else 1
    for name, rank in zip(NAMES, case.ranks, strict=False):
        config = lora(case.kind, twice * rank)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        parameters = dict(model.named_parameters())
        for own, path in paths(model, name).items():
            halves = zip("AB", case.trained[name][own], case.starts[name][own], strict=True)
            for side, now, then in halves:
                start = then if side == "A" else -then
                whole = stacked(case.kind, now, start, side, own) if twice == 2 else now
                parameters[path.format(side)].data.copy_(whole)
    model.set_adapter("default")
    return replace(case, model=model.eval())


@torch.no_grad()
def out(model: Any, **arguments: Any) -> Tensor:
    """The logits, as they are computed."""
    return model.eval()(**inputs(), **arguments).logits.double()


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm())
