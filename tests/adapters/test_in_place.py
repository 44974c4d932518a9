"""Adapters that a model has as its own, without a PeftModel around it (CASES C11)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

import lorainit
from lorainit.adapters.layers import adapters_disabled
from lorainit.errors import AdapterError
from tests.adapters.tiny import METHODS, batch, config, llama, logits, start, train


def by_transformers(model: Any) -> nn.Module:
    model.add_adapter(config())
    return model


def by_peft(model: Any) -> nn.Module:
    return inject_adapter_in_model(config(), model)


WAYS = pytest.mark.parametrize("add", [by_transformers, by_peft])


@WAYS
@pytest.mark.parametrize("kind", ["displaced", "anchored", "anchored-weight", "zero-b"])
def test_started_in_place_as_in_a_peft_model(add: Callable[[Any], nn.Module], kind: str) -> None:
    model = add(llama())
    found = start(model, METHODS[kind], adapter_name="default")
    assert found is model
    expected = start(llama(), METHODS[kind])
    assert torch.equal(logits(model), logits(expected))
    train(model), train(expected)
    assert torch.equal(logits(model), logits(expected))


@WAYS
def test_a_trained_adapter_is_off_while_the_base_is_measured(
    add: Callable[[Any], nn.Module],
) -> None:
    how: dict[str, Any] = {"data": [batch()], "needs": {"gradient"}, "progress": False}
    expected = lorainit.collect_statistics(llama(), config(), **how)
    model = train(add(llama()), rate=0.5)
    live = logits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    found = lorainit.collect_statistics(model, config(), **how)
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].gradient, layer.gradient, rtol=1e-5, atol=1e-8)
    assert torch.equal(logits(model), live)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    start(model, METHODS["displaced"], adapter_name="default")
    assert torch.equal(logits(model), logits(start(llama(), METHODS["displaced"])))


def test_a_trained_adapter_that_is_on_would_be_measured_too() -> None:
    """The negative control."""
    model = train(by_transformers(llama()), rate=0.5)
    assert not torch.allclose(logits(model), logits(llama()), atol=1e-3)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(llama()))


def test_an_adapter_that_was_off_stays_off() -> None:
    model: Any = by_transformers(llama())
    model.disable_adapters()
    before = copy.deepcopy({n: p.requires_grad for n, p in model.named_parameters()})
    with adapters_disabled(model):
        pass
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert all(layer.disable_adapters for layer in layers)


def test_without_an_adapter_a_configuration_is_asked_for() -> None:
    with pytest.raises(AdapterError, match="LoraConfig"):
        start(llama(), METHODS["displaced"], adapter_name="default")
