"""Quantized bases: statistics through their forward, weights read layer by layer, exact starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import lorainit
from lorainit.adapters.targets import match_targets
from lorainit.adapters.weights import read_weight
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes wants an accelerator")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["displaced", "anchored"])
def test_bitsandbytes(bits: int, method: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")

    def load() -> Any:
        quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, device_map={"": 0}
        )

    inputs = {key: value.cuda() for key, value in batch().items()}
    base = load().eval()
    with torch.no_grad():
        expected = base(**inputs).logits
    wrapped = start(base, METHODS[method], data=[inputs])
    with torch.no_grad():
        found = wrapped.eval()(**inputs).logits
    assert torch.equal(found, expected) == (method == "anchored")
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    wrapped(**inputs).loss.backward()
    optimizer.step()
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        live = wrapped(**inputs).logits
        stock = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
        torch.testing.assert_close(stock(**inputs).logits, live, rtol=2e-2, atol=2e-2)
