"""Quantized bases: statistics through their forward, weights read layer by layer, exact starts."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.quantized.bench import Bench
from benchmarks.quantized.checks import CHECKS
from peft import PeftModel
from torch import nn

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.adapters.weights import read_weight
from lorainit.solve import layers, stacks
from tests.adapters.tiny import METHODS, batch, config, llama, logits, start, train

torchao = pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ["int8", "int4"]


def quantized(kind: str) -> Any:
    """The tiny Llama with its linear layers quantized in place, as torchao does it on a CPU."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama(dtype=torch.bfloat16 if kind == "int4" else torch.float32)
    if kind == "int8":
        setting: Any = Int8WeightOnlyConfig()
    else:
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        setting = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    quantize_(
        model, setting, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name
    )
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every linear layer's stored integers and scales."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            "proj" in name
            and "lora_" not in name
            and weight is not None
            and hasattr(weight, "dequantize")
        ):
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = (
                weight.dequantize()
            )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_as_the_forward_uses_them(kind: str) -> None:
    model = quantized(kind)
    targets = match_targets(model, config()).layers
    assert len(targets) == 14
    for target in targets.values():
        weight = read_weight(target.module, target.name)
        assert weight.is_floating_point()
        x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
        tolerance = 1e-5 if kind == "int8" else 2e-2
        torch.testing.assert_close(target.module(x), x @ weight.T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_through_the_quantized_forward(kind: str) -> None:
    """The same as those of a plain model that holds the dequantized weights."""
    model = quantized(kind)
    plain = llama(dtype=torch.bfloat16 if kind == "int4" else torch.float32)
    with torch.no_grad():
        for name, target in match_targets(model, config()).layers.items():
            plain.get_submodule(name).weight.copy_(read_weight(target.module, name))
    arguments: dict[str, Any] = {
        "data": [batch()],
        "needs": lorainit.LoraDA().needs | lorainit.FILet().needs,
        "progress": False,
    }
    found = lorainit.collect_statistics(model, config(), **arguments)
    expected = lorainit.collect_statistics(plain, config(), **arguments)
    tolerance = 1e-4 if kind == "int8" else 5e-2
    for name in expected:
        for field in ("gradient", "input_second_moment", "output_second_moment"):
            first, second = getattr(found[name], field), getattr(expected[name], field)
            error = float((first - second).norm() / second.norm())
            assert error < tolerance, (name, field, error)


@pytest.mark.parametrize("method", ["displaced", "anchored-weight"])
def test_weights_are_dequantized_a_few_at_a_time(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are solved together, and none is kept: here one, where memory is for one."""
    read: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []

    def alive() -> int:
        return sum(reference() is not None for reference in read)

    def reading(module: nn.Module, name: str) -> torch.Tensor:
        weight = read_weight(module, name)
        read.append(weakref.ref(weight))
        most.append(alive())
        return weight

    monkeypatch.setattr(layers, "read_weight", reading)
    monkeypatch.setattr(stacks, "_STACK_BYTES", 1)
    base = quantized("int8")
    start(base, METHODS[method])
    assert len(most) == 14
    # The one before is forgotten when the next is there.
    assert max(most) <= 2
    assert not alive()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["displaced", "anchored", "anchored-weight", "zero-b"])
def test_start_train_save_reload(kind: str, method: str, tmp_path: Path) -> None:
    base = quantized(kind)
    before, base_logits = stored(base), logits(base)
    assert len(before) == 14
    wrapped = start(base, METHODS[method])
    if method == "displaced":
        assert not torch.equal(logits(wrapped), base_logits)
    else:
        assert torch.equal(logits(wrapped), base_logits)
    train(wrapped)
    assert not torch.equal(logits(wrapped), base_logits)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base_logits)
    after = stored(wrapped)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    live = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if kind == "int8" else {"rtol": 2e-2, "atol": 2e-2}
    stock = PeftModel.from_pretrained(quantized(kind), tmp_path)
    torch.testing.assert_close(logits(stock), live, **tolerance)
    again = lorainit.load_adapter(quantized(kind), tmp_path)
    assert torch.equal(logits(again), live)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", CHECKS)
def test_bitsandbytes(name: str, bits: int, tmp_path: Path) -> None:
    """On an accelerator where there is one; bitsandbytes runs on a CPU, too."""
    passed, figures = CHECKS[name](Bench(tmp_path, bits))
    assert passed, figures
