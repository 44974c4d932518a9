"""Law 1: the base model is never changed by a bit; law 2: what is saved is plain LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorainit
from tests.adapters.tiny import (
    METHODS,
    assert_same_bits,
    base_weights,
    batch,
    config,
    llama,
    logits,
    run_fresh,
    start,
    train,
)


@pytest.mark.parametrize("kind", METHODS)
def test_base_weights_keep_every_bit_through_start_training_and_saving(
    kind: str, tmp_path: Path
) -> None:
    model = llama()
    before, base_logits = base_weights(model), logits(model)
    wrapped = start(model, METHODS[kind])
    assert_same_bits(before, base_weights(wrapped))
    train(wrapped)
    assert not torch.equal(logits(wrapped), base_logits)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), base_logits)
    wrapped.save_pretrained(tmp_path)
    lorainit.export(wrapped, tmp_path / "exported")
    assert_same_bits(before, base_weights(wrapped))
    assert torch.equal(logits(wrapped.unload()), base_logits)


@pytest.mark.parametrize("kind", METHODS)
def test_start_in_float32(kind: str) -> None:
    base_logits = logits(llama())
    found = logits(start(llama(), METHODS[kind]))
    if kind == "displaced":
        assert not torch.equal(found, base_logits)
    else:
        assert torch.equal(found, base_logits)


@pytest.mark.parametrize("kind", ["anchored", "anchored-weight"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_anchored_start_in_bfloat16(kind: str, autocast_adapter_dtype: bool) -> None:
    base_logits = logits(llama(dtype=torch.bfloat16))
    wrapped = start(
        llama(dtype=torch.bfloat16),
        METHODS[kind],
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {wanted}
    assert torch.equal(logits(wrapped), base_logits)


def test_anchored_start_survives_a_trainer_that_casts_what_is_trainable() -> None:
    base_logits = logits(llama(dtype=torch.bfloat16))
    wrapped = start(llama(dtype=torch.bfloat16), METHODS["anchored"])
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits(wrapped), base_logits)
    train(wrapped)
    assert not torch.equal(logits(wrapped), base_logits)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Every kind, trained and saved; and its logits, live."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, method in METHODS.items():
            wrapped = train(start(llama(), method))
            wrapped.save_pretrained(root / kind)
            report = lorainit.export(wrapped, root / kind / "exported")
            assert report.objections == ()
            found[kind] = (root / kind, logits(wrapped))
    return found


def test_saved_adapters_in_a_fresh_process_without_lorainit(
    trained: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "base")
    inputs = batch(seed=9)
    save_file(inputs, tmp_path / "inputs.safetensors")
    folders = {kind: str(folder) for kind, (folder, _) in trained.items()}
    modules = run_fresh(
        """
        import torch
        from peft import PeftModel
        from safetensors.torch import load_file, save_file
        from transformers import LlamaForCausalLM
        inputs = load_file(f"{root}/inputs.safetensors")
        out = {}
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            for kind, folder in folders.items():
                for name, path in ((kind, folder), (kind + "-exported", folder + "/exported")):
                    base = LlamaForCausalLM.from_pretrained(f"{root}/base").eval()
                    model = PeftModel.from_pretrained(base, path).eval()
                    found = model(**inputs).logits
                    out[name] = found[inputs["attention_mask"].bool()].contiguous()
        save_file(out, f"{root}/logits.safetensors")
        result = {
            "modules": [m for m in sys.modules if m.split(".")[0] == "lorainit"],
            "adapter warnings": [
                str(w.message) for w in caught if "adapter" in str(w.message).lower()
            ],
        }
        """,
        root=str(tmp_path),
        folders=folders,
    )
    assert modules == {"modules": [], "adapter warnings": []}
    found = load_file(tmp_path / "logits.safetensors")
    for kind, (_, live) in trained.items():
        torch.testing.assert_close(found[kind], live, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found[f"{kind}-exported"], live, rtol=1e-5, atol=2e-6)


def test_saved_adapters_are_of_the_rank_that_their_configuration_says(
    trained: dict[str, tuple[Path, torch.Tensor]],
) -> None:
    for kind, (folder, _) in trained.items():
        tensors = load_file(folder / "adapter_model.safetensors")
        rank = 8 if kind.startswith("anchored") else 4
        assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {rank}
        assert all(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in tensors)


def test_the_users_configuration_is_not_modified() -> None:
    mine = config(rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    before = mine.to_dict()
    wrapped = start(llama(), METHODS["anchored"], mine)
    assert mine.to_dict() == before
    assert wrapped.peft_config["default"] is not mine
