"""Fused experts: left at PEFT's own start, and said; everything else as for other models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import MixtralConfig, MixtralForCausalLM

import lorainit
from tests.adapters.tiny import (
    METHODS,
    assert_same_bits,
    base_weights,
    config,
    logits,
    start,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")

CHANGES: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "parameters": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


def mixtral() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
        return MixtralForCausalLM(settings).eval()


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("form", CHANGES)
def test_experts(kind: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = mixtral()
    before, expected = base_weights(base), logits(base)
    lora = config(r=2, **copy.deepcopy(CHANGES[form]))
    with caplog.at_level("INFO", logger="lorainit"):
        wrapped = start(base, METHODS[kind], lora)
    assert "experts.gate_up_proj" in caplog.text
    if form == "all-linear":
        assert "mlp.gate.weight" in caplog.text
    if kind == "anchored":
        torch.testing.assert_close(logits(wrapped), expected, rtol=1e-6, atol=1e-6)
    train(wrapped, rate=0.5)
    moved = [n for n, p in wrapped.named_parameters() if "experts" in n and "lora_B" in n]
    assert moved
    assert all(bool((wrapped.get_parameter(n) != 0).any()) for n in moved)
    assert_same_bits(before, base_weights(wrapped))
    live = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    for loaded in (
        PeftModel.from_pretrained(mixtral(), tmp_path),
        lorainit.load_adapter(mixtral(), tmp_path),
    ):
        torch.testing.assert_close(logits(loaded), live, rtol=1e-5, atol=2e-6)
    assert loaded.get_nb_trainable_parameters() == wrapped.get_nb_trainable_parameters()
    start(wrapped, METHODS["zero-b"], adapter_name="default")
    assert wrapped.get_nb_trainable_parameters() == loaded.get_nb_trainable_parameters()
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), live, rtol=1e-5, atol=2e-6)


def test_export_with_experts_is_exact_or_refused(tmp_path: Path) -> None:
    lora = config(r=2, **copy.deepcopy(CHANGES["parameters"]))
    wrapped = train(start(mixtral(), METHODS["displaced"], lora))
    report = lorainit.export(wrapped, tmp_path)
    assert any("target_parameters" in objection for objection in report.objections)
    exported = PeftModel.from_pretrained(mixtral(), tmp_path)
    torch.testing.assert_close(logits(exported), logits(wrapped), rtol=1e-5, atol=2e-6)
    lora = config(r=2, **copy.deepcopy(CHANGES["parameters"]))
    anchored = start(mixtral(), METHODS["anchored"], lora)
    with pytest.raises(lorainit.errors.AdapterError, match="save_pretrained"):
        lorainit.export(anchored, tmp_path / "anchored")
    assert lorainit.export(anchored, tmp_path / "cut", rank=2).rank == 2
