"""PEFT's own LoftQ on a CPU: what it writes, and that it is right at one scaling alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.quantized import peft_loftq
from benchmarks.quantized.bases import Case
from benchmarks.quantized.measures import Predictions
from benchmarks.quantized.recover import Rounded, Trial, lora
from benchmarks.quantized.recovery_tables import PEFT_ONE, PEFT_OTHER
from transformers import LlamaConfig, LlamaForCausalLM

from tests.adapters.tiny import batch

CPU = torch.device("cpu")


@pytest.fixture
def case() -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True,
        )  # fmt: skip
        full: Any = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in full.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3.0)
    measure = Predictions(full, [batch(seed=5)])
    return Case(full, [batch()], measure, {"target_modules": "all-linear"})


@pytest.mark.filterwarnings("ignore")
def test_peft_writes_the_best_factors_and_leaves_the_scaling_in(case: Case) -> None:
    model = peft_loftq.started(case, [2, 4], CPU)
    rounded = Rounded(case.full, lora(8))
    rounded.on("nf4")
    layer = "model.layers.1.mlp.down_proj"
    weight, base = (m.get_submodule(layer).weight.double() for m in (case.full, rounded.model))
    u, values, v = torch.linalg.svd(weight - base, full_matrices=False)
    found: Any = model.base_model.model.get_submodule(layer)
    for rank in (2, 4):
        best = u[:, :rank] * values[:rank] @ v[:rank]
        name = f"r{rank}"
        product = found.lora_B[name].weight.double() @ found.lora_A[name].weight.double()
        torch.testing.assert_close(product, best, rtol=1e-3, atol=1e-5)
    assert (product - u[:, :2] * values[:2] @ v[:2]).norm() > 0.1 * product.norm()


@pytest.mark.filterwarnings("ignore")
def test_its_figures_are_loftqs_at_scaling_one_alone(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On some CPUs an evaluation packs four-bit layers and rounds their scales.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    records = list(peft_loftq.measured(case, [4], CPU))
    by_method = {r["method"]: r for r in records}
    assert [r["s"] for r in records] == [1.0, 8.0]
    trial = Trial(case, Rounded(case.full, lora(8)), "nf4")
    ours = next(trial.line("LoftQ", "none", [4], CPU))
    assert records[0]["kl_before"] == pytest.approx(trial.before["kl"], rel=1e-3)
    assert by_method[PEFT_ONE]["kl"] == pytest.approx(ours["kl"], rel=1e-2)
    assert by_method[PEFT_OTHER]["kl"] > 2 * trial.before["kl"]


def test_quantized_weights_are_those_of_the_plain_layers(case: Case) -> None:
    """Double quantization takes others."""
    rounded = Rounded(case.full, lora(8))
    plain = rounded.on("nf4").get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    again = rounded.on("nf4-double").get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    back = rounded.on("nf4").get_submodule("model.layers.0.mlp.up_proj").weight
    assert back.equal(plain)
    assert not again.equal(plain)
