"""PEFT's own start is left out where nothing of it would remain, and nothing else differs for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

import lorainit
from lorainit.adapters import create
from lorainit.adapters.anchor import AnchoredFactor
from lorainit.adapters.targets import match_targets
from tests.adapters.tiny import METHODS, config, llama, start
from tests.test_refinement import sequences
from tests.untouched import untouched

Making = Callable[[], Any]
SEED = 7


def everything(model: PeftModel) -> dict[str, Any]:
    """What a model is, by name: two are the same if these are equal."""
    found: dict[str, Any] = {"modules": repr(model), "active": model.active_adapters}
    found |= {f"mode {name}": module.training for name, module in model.named_modules()}
    anchors = [
        (f"{name}.anchor", module.anchor)
        for name, module in model.named_modules()
        if isinstance(module, AnchoredFactor)
    ]
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *anchors]:
        values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        how = tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride(), type(tensor)
        found[f"tensor {name}"] = (values, *how)
    for name, its in model.peft_config.items():
        found[f"configuration {name}"] = its.to_dict()
    return found


def changed(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [key for key in first | second if first.get(key) != second.get(key)]


class Calls:
    """How PEFT was asked to create adapters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.empty: list[bool] = []
        original = peft.get_peft_model

        def watched(*arguments: Any, **named: Any) -> Any:
            self.empty.append(named.get("low_cpu_mem_usage", False))
            return original(*arguments, **named)

        monkeypatch.setattr(peft, "get_peft_model", watched)


def both_ways(
    make: Making, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[bool], dict[str, Any], dict[str, Any]]:
    """How PEFT was asked, and everything that came of it, as it is and always by PEFT's own start."""
    calls = Calls(monkeypatch)
    found = []
    for ordinary in (False, True):
        with monkeypatch.context() as patch:
            if ordinary:
                patch.setattr(create, "_nothing_remains", lambda *_: False)
            torch.manual_seed(SEED)
            model = make()
            assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
            found.append(everything(model) | {"random": torch.get_rng_state().tolist()})
        if not ordinary:
            asked = list(calls.empty)
    assert not any(calls.empty[len(asked) :])
    return asked, found[0], found[1]


def gpt2() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def with_spare_layer() -> Any:
    """A target that no sequence reaches."""
    model = llama()
    with torch.random.fork_rng(devices=[]):
        model.spare = nn.Linear(32, 32)
    return model


def classifier() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(llama().config).eval()


def of(method: Any, base: Making = llama, /, **changes: Any) -> Making:
    """A start from a method, on a configuration changed so."""
    return lambda: start(base(), method, config(**changes))


def gaussian_twice() -> Any:
    start(llama(), lorainit.Gaussian())
    return start(llama(), lorainit.Gaussian())


PISSA = lorainit.PiSSA()
EMPTY: dict[str, Making] = {
    **{name: of(method) for name, method in METHODS.items() if name != "default"},
    "Natural": of(lorainit.Natural(length=0.1)),
    "drawn": gaussian_twice,
    "length of rows": of(lorainit.Vanilla(size=2.0)),
    "named layers": of(METHODS["displaced"], target_modules=["q_proj", "down_proj"]),
    "ranks": of(PISSA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "redistributed": of(lorainit.EVA(rho=2.0)),
    "dropout, biases": of(METHODS["anchored"], lora_dropout=0.1, bias="all"),
    "inference": of(METHODS["displaced"], inference_mode=True),
    "task": of(PISSA, task_type="CAUSAL_LM"),
    "transposed": of(PISSA, gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "half precision": of(METHODS["displaced"], lambda: llama(dtype=torch.bfloat16)),
    "half precision, anchored": of(METHODS["anchored"], lambda: llama(dtype=torch.float16)),
    "half precision kept": lambda: start(
        llama(dtype=torch.bfloat16), PISSA, autocast_adapter_dtype=False
    ),
    "PEFT's own scheme": of(METHODS["anchored"], init_lora_weights="gaussian"),
}


def second_adapter() -> Any:
    model = start(llama(), PISSA, config(), adapter_name="first")
    return start(model, METHODS["anchored"], config(), adapter_name="second")


def started_again() -> Any:
    model = start(llama(), PISSA)
    return start(model, METHODS["anchored"], None, adapter_name="default")


def unreached(method: Any) -> Making:
    lora = {"target_modules": ["spare", "q_proj"]}
    return lambda: start(with_spare_layer(), method, config(**lora), on_unused="default")


ORDINARY: dict[str, Making] = {
    "Vanilla": of(lorainit.Vanilla()),
    "Auto that falls back": lambda: start(
        llama(), lorainit.Auto(least_gain=0.999), data=sequences()
    ),
    "an embedding": of(METHODS["displaced"], target_modules=["q_proj", "embed_tokens"]),
    "a layer without data": unreached(METHODS["displaced"]),
    "DoRA": of(METHODS["anchored"], use_dora=True),
    "biases of its own": of(PISSA, lora_bias=True),
    "modules to save": of(PISSA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": of(PISSA, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "a head to save": of(PISSA, classifier, target_modules=["q_proj"], task_type="SEQ_CLS"),
    "double precision": of(PISSA, lambda: llama(dtype=torch.float64)),
}


@pytest.mark.parametrize("make", EMPTY.values(), ids=EMPTY)
def test_what_is_written_all_over_is_not_drawn(
    make: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found, ordinary = both_ways(make, monkeypatch)
    assert asked
    assert all(asked)
    assert not changed(found, ordinary)


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_what_keeps_anything_of_pefts_start_is_drawn(
    make: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found, ordinary = both_ways(make, monkeypatch)
    assert asked == [False]
    assert not changed(found, ordinary)


@pytest.mark.parametrize("make", [second_adapter, started_again])
def test_only_the_first_adapter_may_be_empty(make: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, found, ordinary = both_ways(make, monkeypatch)
    assert asked == [True]
    assert not changed(found, ordinary)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, True), (torch.float64, False)])
def test_another_default_dtype_has_other_draws(
    dtype: torch.dtype, count: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Any:
        base = llama()
        torch.set_default_dtype(dtype)
        try:
            return start(base, PISSA)
        finally:
            torch.set_default_dtype(torch.float32)

    asked, found, ordinary = both_ways(make, monkeypatch)
    assert asked == [count]
    assert not changed(found, ordinary)


@pytest.mark.parametrize("method", [PISSA, METHODS["displaced"]], ids=str)
def test_the_random_numbers_that_follow_are_those_after_stock_peft(method: Any) -> None:
    torch.manual_seed(SEED)
    peft.get_peft_model(llama(), config())
    expected = torch.rand(3), torch.randn(3)
    torch.manual_seed(SEED)
    start(llama(), method)
    assert all(map(torch.equal, (torch.rand(3), torch.randn(3)), expected))


@pytest.mark.parametrize("count", [0, 1, 623, 625, 2**10 + 1])
def test_skipped_draws_are_those_of_float32(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "_DRAWN_AT_ONCE", 2**8)
    torch.manual_seed(SEED)
    torch.empty(count).uniform_()
    expected = torch.get_rng_state()
    torch.manual_seed(SEED)
    create._skip_draws(count)
    assert torch.equal(torch.get_rng_state(), expected)
    create._skip_draws(1)
    assert not torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", ["Vanilla", "an embedding", "a layer without data"])
def test_a_start_that_was_wrongly_left_out_would_be_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    torch.manual_seed(SEED)
    expected = everything(ORDINARY[name]())
    monkeypatch.setattr(create, "_nothing_remains", lambda *_: True)
    torch.manual_seed(SEED)
    assert changed(everything(ORDINARY[name]()), expected)


def test_an_adapter_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no room")

    calls, model = Calls(monkeypatch), llama()
    monkeypatch.setattr("lorainit.adapters.install.put_pair", broken)
    with untouched(model), pytest.raises(RuntimeError, match="no room"):
        start(model, PISSA)
    assert calls.empty == [True]


def test_settings_that_are_not_known_get_pefts_start() -> None:
    """So do all that a later PEFT will have."""
    lora = LoraConfig(target_modules=["q_proj"])
    targets = match_targets(llama(), lora)
    factors = {name: None for name in targets.layers}
    assert create._nothing_remains(lora, targets, factors)  # type: ignore[arg-type]
    assert not create._nothing_remains(lora, targets, {})
    lora.of_a_later_version = False
    assert not create._nothing_remains(lora, targets, factors)  # type: ignore[arg-type]


class Subclass(nn.Linear):
    pass


class Wrapped(torch.Tensor):
    """As quantized and sharded weights are."""


def odd_layers() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "a class of its own": Subclass(4, 4),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "offloaded": nn.Linear(4, 4, device="meta"),
        "a tensor of its own": nn.Linear(4, 4),
        "eight bits": nn.Linear(4, 4).to(torch.float8_e4m3fn),
        "no weight": nn.Identity(),
    }
    weight = found["a tensor of its own"].weight.detach().as_subclass(Wrapped)  # type: ignore[operator]
    found["a tensor of its own"].weight = nn.Parameter(weight)
    return found


def test_only_plain_layers_are_left_out_of_pefts_start() -> None:
    assert create._is_plain(nn.Linear(4, 4))
    assert [name for name, layer in odd_layers().items() if create._is_plain(layer)] == []
