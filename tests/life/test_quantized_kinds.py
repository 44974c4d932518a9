"""Every quantized base that PEFT adapts and that runs on a CPU: read, measured, given back, saved.

bitsandbytes and HQQ are in the ``dev`` extra: nothing here is skipped.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import lorainit
from lorainit.adapters import weights
from lorainit.adapters.targets import match_targets
from lorainit.adapters.weights import read_weight
from tests.adapters.tiny import batch, llama, logits, start, train
from tests.adapters.tiny import config as tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")

TAKEN = {
    "nf4": (0.05, 0.12),
    "nf4-double": (0.05, 0.12),
    "fp4": (0.07, 0.2),
    "llm.int8": (0.003, 0.02),
    "hqq8": (0.001, 0.01),
    "hqq4": (0.03, 0.1),
    "hqq3": (0.08, 0.2),
    "hqq2": (0.2, 0.45),
    "torchao-int8": (0.003, 0.02),
    "torchao-int4": (0.05, 0.15),
}
"""Kinds, and between what numbers ``|W - Q| / |W|`` lies for normal weights."""

kinds = pytest.mark.parametrize("kind", TAKEN)


def config(**changes: Any) -> LoraConfig:
    """Targets by name: PEFT's "all-linear" does not match HQQ's layers."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return tiny_config(target_modules=names, **changes)


def bitsandbytes_layer(kind: str, layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    size = layer.in_features, layer.out_features
    if kind == "llm.int8":
        found: Any = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        found.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False)
    else:
        found = bnb.nn.Linear4bit(
            *size,
            bias=False,
            quant_type=kind[:3],
            compress_statistics=kind.endswith("double"),
            compute_dtype=torch.float32,
        )
        found.weight = bnb.nn.Params4bit(
            layer.weight.detach().clone(),
            requires_grad=False,
            quant_type=kind[:3],
            compress_statistics=kind.endswith("double"),
        )
        # On some CPUs an evaluation packs the layer, which these are too small for.
        found.support_avx512bf16_for_cpu = False
    return found.to("cpu")


def hqq_layer(kind: str, layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=int(kind[3:]), group_size=16)
    return HQQLinear(copy.deepcopy(layer), how, compute_dtype=torch.float32, device="cpu")


def quantized(kind: str, full: nn.Module | None = None) -> Any:
    """The tiny Llama with all its linear layers but the last quantized, in float32."""
    model = copy.deepcopy(llama() if full is None else full)
    if kind.startswith("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        how: Any = Int8WeightOnlyConfig()
        if kind.endswith("int4"):
            how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
        quantize_(model, how, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "proj" in name)
        return model
    make = hqq_layer if kind.startswith("hqq") else bitsandbytes_layer
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "proj" in name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(kind, module))
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What every target's forward multiplies by, dequantized, in float64."""
    layers = match_targets(model, config()).layers
    return {name: read_weight(t.module, name).double() for name, t in layers.items()}


@kinds
def test_weights_are_read_as_the_forward_uses_them(kind: str) -> None:
    # Rows of whole blocks: bitsandbytes takes others' scales wrongly on CPUs with AVX512.
    full = llama(width=128)
    model = quantized(kind, full)
    before = stored(model)
    assert len(before) == 14
    least, most = TAKEN[kind]
    for name, weight in before.items():
        own = full.get_submodule(name).weight.double()
        assert least < float((own - weight).norm() / own.norm()) < most
        layer = model.get_submodule(name)
        x = torch.randn(3, weight.shape[1])
        # LLM.int8 rounds what goes in to eight bits, too.
        error = layer(x).double() - x.double() @ weight.T
        assert error.norm() < (2e-2 if kind == "llm.int8" else 1e-5) * layer(x).norm()
    after = stored(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@kinds
def test_statistics_are_those_of_the_dequantized_model(kind: str) -> None:
    model, plain = quantized(kind), llama()
    with torch.no_grad():
        for name, weight in stored(model).items():
            plain.get_submodule(name).weight.copy_(weight)
    needs = lorainit.Natural().needs
    found, wanted = (
        lorainit.collect_statistics(m, config(), data=[batch()], needs=needs, progress=False)
        for m in (model, plain)
    )
    for name in wanted:
        for field in needs:
            first, second = getattr(found[name], field), getattr(wanted[name], field)
            limit = 0.1 if kind == "llm.int8" else 1e-4
            assert (first - second).norm() < limit * second.norm(), (name, field)


@kinds
@pytest.mark.parametrize("method", [lorainit.LoftQ(), lorainit.QERA(), lorainit.KroneckerQER()])
def test_the_start_is_the_best_of_its_rank(kind: str, method: Any) -> None:
    """The whole rank gives all back; less leaves less than nothing would, in the norm of each method."""
    full = llama()
    lora = config(r=16, lora_alpha=32)
    found = start(quantized(kind, full), method, lora, reference_weights=full)
    base = stored(quantized(kind, full))
    for name, weight in base.items():
        error = full.get_submodule(name).weight.double() - weight
        layer = found.get_base_model().get_submodule(name)
        rest = error - layer.get_delta_weight("default").double()
        if min(error.shape) <= 16:
            assert rest.norm() < 1e-3 * error.norm()
        elif isinstance(method, lorainit.LoftQ):
            values = torch.linalg.svdvals(error)
            torch.testing.assert_close(rest.norm(), values[16:].norm(), rtol=1e-3, atol=1e-8)


@kinds
def test_outputs_come_nearer_and_the_adapter_is_plain_lora(kind: str, tmp_path: Path) -> None:
    """Started, trained, saved; stock PEFT on the same base gives the same outputs, stored weights the same."""
    full = llama()
    base = quantized(kind, full)
    before, wanted = stored(base), logits(full)
    far = (logits(base) - wanted).norm()
    lora = config(r=16, lora_alpha=32)
    found = start(base, lorainit.QERA(), lora, reference_weights=full)
    # Inputs rounded to eight bits are no error of the weights.
    assert (logits(found) - wanted).norm() < (1.0 if kind == "llm.int8" else 0.7) * far
    train(found)
    live = logits(found)
    found.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(kind, full), tmp_path)
    torch.testing.assert_close(logits(again), live, rtol=1e-5, atol=1e-5)
    after = stored(found)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_an_empty_weight_that_tells_the_dtype_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of transformers give HQQ's layers one."""
    from hqq.core.quantize import HQQLinear

    model = quantized("hqq4")
    before = stored(model)
    monkeypatch.setattr(HQQLinear, "weight", property(lambda layer: torch.empty(0)), raising=False)
    after = stored(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    data = [batch(), batch()]
    # Natural asks for the norms of the weights.
    lorainit.get_peft_model(model, config(), method=lorainit.Natural(), data=data, progress=False)


def test_statistics_of_the_full_precision_model_are_taken_with_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At two bits a few entries of a weight may no longer look like the weight that was quantized."""
    monkeypatch.setattr(weights, "_SIMILAR", 0.999)
    full, base = llama(), quantized("hqq2")
    method = lorainit.KroneckerQER()
    statistics = lorainit.collect_statistics(
        full, config(), data=[batch()], needs=method.needs, progress=False
    )
    other = lorainit.Statistics(statistics, statistics.metadata)
    with pytest.raises(lorainit.errors.StatisticsFileError, match="other weights"):
        lorainit.get_peft_model(
            base, config(), method=lorainit.FILet(), statistics=statistics, progress=False
        )
    found, wanted = (
        start(quantized("hqq2"), method, config(), reference_weights=full, statistics=known)
        for known in (statistics, other)
    )
    for name, value in wanted.named_parameters():
        if "lora_" in name:
            assert torch.equal(found.get_parameter(name), value), name
    statistics.fingerprints = {n: -f for n, f in statistics.fingerprints.items()}
    with pytest.raises(lorainit.errors.StatisticsFileError, match="other weights"):
        start(quantized("hqq2"), method, config(), reference_weights=full, statistics=statistics)
