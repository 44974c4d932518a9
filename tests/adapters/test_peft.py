"""Everything that stock PEFT does with an adapter, on displaced, anchored and zero-B starts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import lorainit
from lorainit.errors import AdapterError, LorainitError, TargetError
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

KINDS = ["displaced", "anchored", "zero-b"]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


def reloaded(wrapped: PeftModel, folder: Path, base: Any = None, **arguments: Any) -> PeftModel:
    """Saved, and loaded by stock PEFT onto a fresh base."""
    wrapped.save_pretrained(folder)
    name = next(iter(wrapped.peft_config))
    path = folder if name == "default" else folder / name
    return PeftModel.from_pretrained(llama() if base is None else base, path, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(kind: str, safe_merge: bool) -> None:
    wrapped = train(start(llama(), METHODS[kind]))
    live = logits(wrapped)
    merged = wrapped.merge_and_unload(safe_merge=safe_merge)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), live, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind: str) -> None:
    wrapped = train(start(llama(), METHODS[kind]))
    before, live = base_weights(wrapped), logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), live, **CLOSE)
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        start(wrapped, METHODS[kind], config(), adapter_name="other")
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), live, **CLOSE)
    for name, weight in base_weights(wrapped).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def two_adapters(train_them: bool = True) -> PeftModel:
    """'first' anchored, 'second' displaced, on one model; trained apart."""
    wrapped = start(llama(), METHODS["anchored"], config(), adapter_name="first")
    if train_them:
        train(wrapped)
    start(wrapped, METHODS["displaced"], config(), adapter_name="second")
    wrapped.set_adapter("second")
    if train_them:
        train(wrapped, seed=5)
    return wrapped


def test_two_adapters_do_not_touch_each_other() -> None:
    alone = start(llama(), METHODS["anchored"])
    train(alone)
    wrapped = start(llama(), METHODS["anchored"], config(), adapter_name="first")
    train(wrapped)
    first = logits(wrapped)
    assert torch.equal(first, logits(alone))
    start(wrapped, METHODS["displaced"], config(), adapter_name="second")
    assert wrapped.active_adapter == "first"
    assert torch.equal(logits(wrapped), first)
    wrapped.set_adapter("second")
    assert torch.equal(logits(wrapped), logits(start(llama(), METHODS["displaced"])))
    train(wrapped, seed=5)
    second = logits(wrapped)
    wrapped.set_adapter("first")
    assert torch.equal(logits(wrapped), first)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(llama()))
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert names
    assert all(".first." in n for n in names)
    wrapped.delete_adapter("first")
    wrapped.set_adapter("second")
    assert torch.equal(logits(wrapped), second)
    assert not any(".first." in n for n in wrapped.state_dict())


def test_two_adapters_are_saved_apart_and_loaded_together(tmp_path: Path) -> None:
    wrapped = two_adapters()
    wrapped.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first")
    stock.load_adapter(tmp_path / "second", adapter_name="second")
    ours = lorainit.load_adapter(llama(), tmp_path / "first", adapter_name="first")
    lorainit.load_adapter(ours, tmp_path / "second", adapter_name="second")
    for name in ("first", "second"):
        wrapped.set_adapter(name)
        for other in (stock, ours):
            other.set_adapter(name)
            torch.testing.assert_close(logits(other), logits(wrapped), **CLOSE)


def deltas(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_add_weighted_adapter(combination: str, tmp_path: Path) -> None:
    wrapped = two_adapters()
    if combination == "linear":
        # PEFT combines equal ranks only, and to it the anchored one is of the rank 8 of its files.
        with pytest.raises(ValueError, match="same r"):
            wrapped.add_weighted_adapter(["first", "second"], [0.7, -0.4], "both", "linear")
        wrapped.add_weighted_adapter(["first"], [0.7], "both", "linear")
        weights = {"first": 0.7}
    else:
        weights = {"first": 0.7, "second": -0.4}
        extra = {"svd_rank": 12} if combination == "svd" else {}
        wrapped.add_weighted_adapter([*weights], [*weights.values()], "both", combination, **extra)
    found = deltas(wrapped, "both")
    parts = {name: deltas(wrapped, name) for name in weights}
    for layer, delta in found.items():
        expected = sum(w * parts[name][layer] for name, w in weights.items())
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=2e-6)
    wrapped.set_adapter("both")
    live = logits(wrapped)
    wrapped.save_pretrained(tmp_path, selected_adapters=["both"])
    assert not (tmp_path / "both" / "lorainit.json").exists()
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), tmp_path / "both")), live, **CLOSE
    )


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 12, "down_proj": 3}},
        {
            "use_rslora": True,
            "rank_pattern": {"v_proj": 6},
            "alpha_pattern": {"v_proj": 5, "gate_proj": 1},
        },
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 1}},
        {"lora_bias": True},
        {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"trainable_token_indices": [3, 5], "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1.*(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"lora_dropout": 0.3},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_configurations_keep_their_scaling_and_reload(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    stock = peft.get_peft_model(llama(), config(**changes))
    wrapped = start(llama(), METHODS[kind], config(**changes))
    scalings = {
        n: m.scaling["default"] for n, m in stock.named_modules() if isinstance(m, LoraLayer)
    }
    found = {
        n: m.scaling["default"] for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)
    }
    assert found == pytest.approx(scalings)
    if kind != "displaced":
        torch.testing.assert_close(logits(wrapped), logits(llama()), rtol=1e-5, atol=1e-6)
    trainable = wrapped.get_nb_trainable_parameters()[0]
    assert trainable == stock.get_nb_trainable_parameters()[0]
    train(wrapped)
    live = logits(wrapped)
    torch.testing.assert_close(logits(reloaded(wrapped, tmp_path)), live, **CLOSE)
    again = lorainit.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(again), live, **CLOSE)
    assert again.get_nb_trainable_parameters()[0] == trainable
    report = lorainit.export(wrapped, tmp_path / "exported")
    assert set(report.errors.values()) == {0.0}
    stored = LoraConfig.from_pretrained(tmp_path / "exported")
    assert (stored.rank_pattern, stored.alpha_pattern, stored.use_rslora) == ({}, {}, False)
    exported = PeftModel.from_pretrained(llama(), tmp_path / "exported")
    torch.testing.assert_close(logits(exported), live, **CLOSE)


def test_saved_scalings_of_an_anchored_adapter(tmp_path: Path) -> None:
    """By the files alone: scaling of every layer as configured, ranks doubled."""
    lora = config(use_rslora=True, rank_pattern={"v_proj": 6}, alpha_pattern={"gate_proj": 1})
    start(llama(), METHODS["anchored"], lora).save_pretrained(tmp_path)
    stored = LoraConfig.from_pretrained(tmp_path)
    assert stored.r == 8
    assert stored.lora_alpha == pytest.approx(8 * 2**0.5)
    assert stored.rank_pattern == {"v_proj": 12}
    assert stored.alpha_pattern == pytest.approx({"gate_proj": 2**0.5})
    assert stored.init_lora_weights is True


@pytest.mark.parametrize("kind", KINDS)
def test_dora_magnitude_is_of_the_started_weight(kind: str) -> None:
    wrapped = start(llama(), METHODS[kind], config(use_dora=True))
    plain = start(llama(), METHODS[kind])
    torch.testing.assert_close(logits(wrapped), logits(plain), rtol=1e-5, atol=1e-5)
    for module in wrapped.modules():
        if hasattr(module, "lora_magnitude_vector") and "default" in module.lora_magnitude_vector:
            weight = module.get_base_layer().weight + module.get_delta_weight("default")
            magnitude = module.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(magnitude, weight.norm(dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings(kind: str, tmp_path: Path) -> None:
    model = llama(tied=True)
    before = base_weights(model)
    wrapped = train(start(model, METHODS[kind]))
    assert_same_bits(before, base_weights(wrapped))
    live = logits(wrapped)
    found = reloaded(wrapped, tmp_path, llama(tied=True))
    torch.testing.assert_close(logits(found), live, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_tied_to_the_embedding_leaves_the_embedding_alone(
    kind: str, tmp_path: Path
) -> None:
    model = llama(tied=True)
    before = base_weights(model)
    wrapped = train(start(model, METHODS[kind], config(target_modules=["lm_head", "q_proj"])))
    assert_same_bits(before, base_weights(wrapped))
    live = logits(wrapped)
    found = reloaded(wrapped, tmp_path, llama(tied=True))
    torch.testing.assert_close(logits(found), live, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_started_or_said_and_saved(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = config(target_modules=["embed_tokens", "q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    with caplog.at_level("INFO", logger="lorainit"):
        wrapped = start(llama(), METHODS[kind], lora)
    assert ("embed_tokens" in caplog.text) == kind.startswith("anchored")
    if kind != "displaced":
        torch.testing.assert_close(logits(wrapped), logits(llama()), rtol=1e-5, atol=1e-6)
    train(wrapped, rate=0.5)
    live = logits(wrapped)
    torch.testing.assert_close(logits(reloaded(wrapped, tmp_path)), live, **CLOSE)
    again = lorainit.load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(again), live, **CLOSE)
    trainable = wrapped.get_nb_trainable_parameters()[0]
    assert again.get_nb_trainable_parameters()[0] == trainable
    report = lorainit.export(wrapped, tmp_path / "exported")
    assert any("embed_tokens" in objection for objection in report.objections)
    exported = PeftModel.from_pretrained(llama(), tmp_path / "exported")
    torch.testing.assert_close(logits(exported), live, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_low_cpu_mem_usage_on_loading(kind: str, tmp_path: Path) -> None:
    wrapped = train(start(llama(), METHODS[kind]))
    live = logits(wrapped)
    found = reloaded(wrapped, tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(found), live, **CLOSE)
    ours = lorainit.load_adapter(llama(), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(ours), live, **CLOSE)


@pytest.mark.parametrize("kind", [*KINDS, "default"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_an_adapter_on_the_meta_device_is_started(kind: str, changes: dict[str, Any]) -> None:
    targets = ["q_proj", "up_proj"] + ([] if changes else ["embed_tokens"])
    lora = config(target_modules=targets, **changes)
    empty = peft.get_peft_model(llama(), lora, low_cpu_mem_usage=True)
    wrapped = start(empty, METHODS[kind], None, adapter_name="default")
    assert wrapped is empty
    assert not any(p.is_meta for p in wrapped.parameters())
    expected = start(llama(), METHODS[kind], lora)
    if kind != "default":
        torch.testing.assert_close(logits(wrapped), logits(expected), rtol=1e-5, atol=1e-6)
    train(wrapped)
    assert torch.isfinite(logits(wrapped)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy(kind: str) -> None:
    wrapped = train(start(llama(), METHODS[kind]))
    twin = copy.deepcopy(wrapped)
    live = logits(wrapped)
    assert torch.equal(logits(twin), live)
    train(twin)
    assert torch.equal(logits(wrapped), live)
    assert not torch.equal(logits(twin), live)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_started_again_by_another_method(changes: dict[str, Any], tmp_path: Path) -> None:
    """Anchored, displaced, anchored, zero-B: each as if it were the first."""
    wrapped = start(llama(), METHODS["anchored"], config(**changes))
    for kind in ("displaced", "anchored-weight", "anchored", "zero-b"):
        train(wrapped)
        start(wrapped, METHODS[kind], adapter_name="default")
        first = start(llama(), METHODS[kind], config(**changes))
        assert torch.equal(logits(wrapped), logits(first)), kind
        ours, theirs = wrapped.peft_config["default"], first.peft_config["default"]
        assert (ours.r, ours.lora_alpha, ours.rank_pattern, ours.alpha_pattern) == (
            theirs.r,
            pytest.approx(theirs.lora_alpha),
            theirs.rank_pattern,
            theirs.alpha_pattern,
        )
        train(wrapped), train(first)
        assert torch.equal(logits(wrapped), logits(first)), kind
        folder = tmp_path / kind
        torch.testing.assert_close(logits(reloaded(wrapped, folder)), logits(wrapped), **CLOSE)


def test_starting_an_adapter_of_the_users_own_model_keeps_the_users_configuration() -> None:
    mine = config()
    before = mine.to_dict()
    stock = peft.get_peft_model(llama(), mine)
    start(stock, METHODS["anchored"], adapter_name="default")
    # PEFT itself spells out the targets and the base model's name in it.
    own = {"target_modules": mine.target_modules, "base_model_name_or_path": ""}
    assert mine.to_dict() | own == before | own
    assert mine.r == 4
    assert stock.peft_config["default"].r == 8


def test_duplicate_or_foreign_adapters_are_refused(tmp_path: Path) -> None:
    wrapped = start(llama(), METHODS["anchored"])
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="already"):
        lorainit.load_adapter(wrapped, tmp_path)
    with pytest.raises(AdapterError, match="adapter_config"):
        lorainit.load_adapter(llama(), tmp_path / "nothing")
    with pytest.raises(AdapterError, match="r=16"):
        start(wrapped, METHODS["anchored"], config(r=16), adapter_name="default")
    with pytest.raises(TargetError, match="no_such"):
        start(llama(), METHODS["anchored"], config(target_modules=["no_such_layer"]))
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(AdapterError, match="IA3Config"):
        lorainit.load_adapter(llama(), tmp_path / "ia3")


def test_a_failure_while_installing_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorainit.adapters import install

    model = llama()
    before, names = base_weights(model), [n for n, _ in model.named_modules()]

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(install, "prepare_pair", fail)
    with pytest.raises(torch.OutOfMemoryError):
        start(model, METHODS["anchored"])
    assert [n for n, _ in model.named_modules()] == names
    assert_same_bits(before, base_weights(model))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    monkeypatch.undo()
    wrapped = start(model, METHODS["displaced"])
    train(wrapped)
    live = logits(wrapped)
    monkeypatch.setattr(install, "prepare_pair", fail)
    with pytest.raises(torch.OutOfMemoryError):
        start(wrapped, METHODS["anchored"], adapter_name="default")
    with pytest.raises(torch.OutOfMemoryError):
        start(wrapped, METHODS["anchored"], config(), adapter_name="second")
    assert list(wrapped.peft_config) == ["default"]
    assert torch.equal(logits(wrapped), live)


def test_a_stale_or_damaged_side_file_is_refused(tmp_path: Path) -> None:
    train(start(llama(), METHODS["anchored"])).save_pretrained(tmp_path)
    stock = peft.get_peft_model(llama(), config(r=6))
    stock.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="another adapter"):
        lorainit.load_adapter(llama(), tmp_path)
    loaded = lorainit.load_adapter(llama(), tmp_path, anchored=False)
    assert loaded.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    (tmp_path / "lorainit.json").write_text("{")
    with pytest.raises(AdapterError, match="damaged"):
        lorainit.load_adapter(llama(), tmp_path)
    (tmp_path / "lorainit.json").unlink()
    lorainit.load_adapter(llama(), tmp_path)
    odd = tmp_path / "odd"
    peft.get_peft_model(llama(), config(r=3)).save_pretrained(odd)
    with pytest.raises(AdapterError, match="rank 3"):
        lorainit.load_adapter(llama(), odd, anchored=True)


def test_an_adapter_of_another_rank_does_not_load_into_an_anchored_one(tmp_path: Path) -> None:
    start(llama(), METHODS["displaced"]).save_pretrained(tmp_path)
    wrapped = start(llama(), METHODS["anchored"])
    with pytest.raises(RuntimeError, match="twice"):
        wrapped.load_adapter(tmp_path, "default", is_trainable=True)


def test_adapter_names_in_a_batch() -> None:
    wrapped = two_adapters()
    inputs = batch(rows=2, seed=9)
    expected = []
    for name in ("first", "second"):
        wrapped.set_adapter(name)
        expected.append(wrapped.eval()(**inputs).logits)
    with torch.no_grad():
        mixed = wrapped(**inputs, adapter_names=["first", "second"]).logits
    torch.testing.assert_close(mixed[0], expected[0][0], **CLOSE)
    torch.testing.assert_close(mixed[1], expected[1][1], **CLOSE)


def test_hidden_state_dict_has_no_name_of_ours(tmp_path: Path) -> None:
    wrapped = start(llama(), METHODS["anchored"], config(lora_bias=True))
    stock = peft.get_peft_model(llama(), config(r=8, lora_bias=True))
    assert wrapped.state_dict().keys() == stock.state_dict().keys()
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {k: v.shape for k, v in peft.get_peft_model_state_dict(stock).items()}
    assert {k: v.shape for k, v in tensors.items()} == shapes


def test_errors_of_this_room_are_the_packages_own() -> None:
    assert issubclass(AdapterError, LorainitError)


@pytest.mark.parametrize("kind", METHODS)
def test_factors_are_contiguous(kind: str) -> None:
    """A fused optimizer pairs a factor with its state by memory order, also after reloading."""
    wrapped = start(llama(), METHODS[kind])
    start(wrapped, METHODS["zero-b"], adapter_name="default")
    again = start(llama(), METHODS[kind])
    for model in (wrapped, again):
        assert all(p.is_contiguous() for p in model.parameters() if p.requires_grad)
