"""Every field of PEFT's LoraConfig is honoured, without a say, or refused before any work (CASES C4 to C6)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel

import lorainit
from lorainit.adapters.supported import HONOURED, REFUSED, WITHOUT_A_SAY, check_supported
from lorainit.errors import AdapterError, TargetError
from tests.adapters.tiny import (
    METHODS,
    assert_same_bits,
    base_weights,
    batch,
    config,
    llama,
    logits,
    start,
    train,
)

FIELDS = {field.name for field in dataclasses.fields(LoraConfig)}
KINDS = ["displaced", "anchored", "zero-b"]


def sub(name: str, **arguments: Any) -> Any:
    kind = getattr(peft, name, None) or getattr(peft.tuners.lora.config, name, None)
    return None if kind is None else kind(**arguments)


VALUES: dict[str, Any] = {
    "layer_replication": [(0, 2), (1, 2)],
    "use_qalora": True,
    "use_bdlora": sub(
        "BdLoraConfig", target_modules_bd_a=["q_proj"], nblocks=2, match_strict=False
    ),
    "kasa_config": sub("KasaConfig"),
    "monteclora_config": sub("MontecloraConfig"),
    "velora_config": sub("VeloraConfig"),
    "arrow_config": sub("ArrowConfig"),
    "megatron_config": {"a": 1},
    "megatron_core": "another",
}


def test_every_field_of_peft_is_in_one_table() -> None:
    """Fails when PEFT adds a field: decide what a start does about it, and say it in a table."""
    tables = [HONOURED, WITHOUT_A_SAY, REFUSED]
    assert FIELDS - set().union(*tables) == set()
    assert sum(map(len, tables)) == len(set().union(*tables))


def untouchable() -> Any:
    raise AssertionError("the data were read")
    yield


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refused_before_any_work(field: str) -> None:
    if field not in FIELDS:
        pytest.skip("not in this PEFT")
    model = llama()
    before, names = base_weights(model), [n for n, _ in model.named_modules()]
    lora = config(**{field: VALUES[field]})
    with pytest.raises(AdapterError, match=rf"{field}=.*\.$"):
        start(model, METHODS["displaced"], lora, data=untouchable())
    with pytest.raises(AdapterError, match=field):
        lorainit.collect_statistics(model, lora, data=untouchable(), needs={"gradient"})
    assert [n for n, _ in model.named_modules()] == names
    assert_same_bits(before, base_weights(model))


@pytest.mark.parametrize("field", ["use_bdlora", "velora_config"])
def test_an_adapter_that_is_there_already_is_refused_too(field: str) -> None:
    if field not in FIELDS:
        pytest.skip("not in this PEFT")
    model = peft.get_peft_model(
        llama(), config(**{field: VALUES[field]}, target_modules=["q_proj"])
    )
    with pytest.raises(AdapterError, match=field):
        start(model, METHODS["displaced"], adapter_name="default", data=untouchable())


def test_other_kinds_of_adapters_are_refused() -> None:
    ada = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)
    with pytest.raises(AdapterError, match="AdaLoraConfig"):
        start(llama(), METHODS["displaced"], ada, data=untouchable())


def test_a_field_of_a_newer_peft_is_refused_where_it_is_set(monkeypatch: Any) -> None:
    monkeypatch.delitem(HONOURED, "use_dora")
    check_supported(config())
    with pytest.raises(AdapterError, match="not known"):
        check_supported(config(use_dora=True))


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["lm_head", "q_proj"]])
def test_tied_layers_whose_factors_peft_ties_are_refused(targets: list[str]) -> None:
    model = llama(tied=True)
    lora = config(target_modules=targets, ensure_weight_tying=True)
    with pytest.raises(TargetError, match="ensure_weight_tying"):
        start(model, METHODS["displaced"], lora, data=untouchable())
    # Not tied, or the head left out: nothing to refuse.
    start(llama(), METHODS["displaced"], lora)
    start(model, METHODS["displaced"], config(target_modules=["q_proj"], ensure_weight_tying=True))


def test_peft_ties_the_factors_of_tied_layers() -> None:
    """What the refusal is for."""
    lora = config(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    base = peft.get_peft_model(llama(tied=True), lora).get_base_model()
    head, embedding = base.lm_head, base.model.embed_tokens
    shared = head.lora_B["default"].weight.untyped_storage().data_ptr()
    assert shared == embedding.lora_embedding_A["default"].untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_an_activated_adapter(kind: str, tmp_path: Path) -> None:
    """aLoRA: the adapter acts from its invocation tokens on, and is trained and saved as any other."""
    lora = config(
        task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], target_modules=["q_proj", "up_proj"]
    )
    inputs = batch(rows=3)
    inputs["input_ids"][:, 2:4] = torch.tensor([5, 6])
    base = llama()(**inputs).logits
    wrapped = start(llama(), METHODS[kind], lora)
    found = wrapped.eval()(**inputs).logits
    if kind != "displaced":
        assert torch.equal(found, base)
    else:
        assert torch.equal(found[:, :2], base[:, :2])
        assert not torch.equal(found[:, 4], base[:, 4])
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    wrapped(**inputs).loss.backward()
    optimizer.step()
    live = logits(wrapped, inputs)
    assert not torch.equal(live, llama()(**inputs).logits[inputs["attention_mask"].bool()])
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again, inputs), live, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal", "mica", "eva", False])
def test_pefts_own_starts_leave_the_base_alone(init: Any) -> None:
    """Some of PEFT's write into the base; asked for here, they do not run."""
    if init == "mica" and not hasattr(peft.tuners.lora.layer.LoraLayer, "mica_init"):
        pytest.skip("not in this PEFT")
    model = llama()
    before = base_weights(model)
    wrapped = start(model, METHODS["anchored"], config(init_lora_weights=init))
    assert_same_bits(before, base_weights(wrapped))
    assert wrapped.peft_config["default"].init_lora_weights is True
    train(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(llama()))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"eva_config": peft.EvaConfig(rho=2.0)}, "eva_config="),
        ({"init_lora_weights": True}, None),
        ({}, None),
    ],
)
def test_a_start_that_peft_was_asked_for_is_answered(
    arguments: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    lorainit.get_peft_model(llama(), config(**arguments), method=lorainit.Vanilla(), progress=False)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [said in text and "method=" in text for text in warnings] == (
        [] if said is None else [True]
    )
