"""Tools that write factors by name, combine adapters or read side files (CASES C1, C2, C9, C10)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn

import lorainit
from lorainit.adapters.layers import is_anchored
from lorainit.errors import AdapterError
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

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
TARGETS = ["q_proj", "down_proj"]


def small(**changes: Any) -> Any:
    return config(**({"target_modules": TARGETS} | changes))


def layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def deltas(model: PeftModel, name: str) -> list[Tensor]:
    return [layer.get_delta_weight(name).detach() for layer in layers(model)]


# Hot swapping


@pytest.mark.parametrize("rank", [2, 4, 7])
@pytest.mark.parametrize("old", ["anchored", "zero-b"])
@pytest.mark.parametrize("new", ["anchored", "displaced"])
def test_hotswap(old: str, new: str, rank: int, tmp_path: Path) -> None:
    """To a smaller, the same, and a larger rank than the one that is there."""
    other = train(start(llama(), METHODS[new], small(r=rank)), rate=0.5)
    other.save_pretrained(tmp_path)
    model = train(start(llama(), METHODS[old], small()))
    before = base_weights(model)
    assert not torch.allclose(logits(model), logits(other), **CLOSE)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(other), **CLOSE)
    assert_same_bits(before, base_weights(model))


@pytest.mark.parametrize("target_rank", [8, 16])
def test_hotswap_of_a_compiled_model(target_rank: int, tmp_path: Path) -> None:
    def model(seed: int, rank: int) -> PeftModel:
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20))
        layers.load_state_dict(weights)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])
        made = lorainit.get_peft_model(layers, lora, method=lorainit.PiSSA(), progress=False)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return made

    torch.manual_seed(0)
    weights = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20)).state_dict()
    x = torch.randn(3, 24)
    # Saved at twice the rank, it fits into what is there and into what is padded.
    model(1, 3).save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(model(2, 3).unload(), tmp_path)(x).detach()
    one = model(2, 4)
    live = one(x).detach()
    prepare_model_for_compiled_hotswap(one, target_rank=target_rank)
    torch.testing.assert_close(one(x).detach(), live)
    # At its own rank nothing is padded, and it stays anchored.
    assert all(is_anchored(layer, "default") == (target_rank == 8) for layer in layers(one))
    torch._dynamo.reset()
    compiled = torch.compile(one, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), live)
    hotswap_adapter(compiled, tmp_path, "default")
    assert not torch.allclose(live, other, atol=1e-3)
    torch.testing.assert_close(compiled(x).detach(), other)


# A reference adapter, as TRL's DPO, KTO, GRPO and RLOO trainers make it


def reference(model: PeftModel) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            copied = model.get_parameter(name.replace(".default.", ".ref."))
            copied.data.copy_(parameter.data)


@pytest.mark.parametrize("kind", ["anchored", "anchored-weight", "displaced", "zero-b"])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_reference_adapter_is_a_copy(kind: str, changes: dict[str, Any]) -> None:
    model = train(start(llama(), METHODS[kind], small(**changes)))
    live = logits(model)
    reference(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), live)
    model.set_adapter("default")
    train(model)
    assert not torch.equal(logits(model), live)
    model.set_adapter("ref")
    assert torch.equal(logits(model), live)


def test_an_adapter_of_an_anchored_ones_configuration_starts_as_it_did() -> None:
    model = start(llama(), METHODS["anchored"], small())
    first = copy.deepcopy(model)
    train(model)
    model.add_adapter("again", model.peft_config["default"])
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(llama()))
    train(model, seed=7), train(first, seed=7)
    assert torch.equal(logits(model), logits(first))


def test_anothers_trained_half_is_not_taken_for_the_whole() -> None:
    """The negative control: only what is made to be a copy takes half a factor."""
    model = start(llama(), METHODS["anchored"], small())
    plain = start(llama(), METHODS["zero-b"], small())
    name = next(n for n, _ in plain.named_parameters() if "lora_A" in n)
    with pytest.raises(RuntimeError, match="must match"):
        model.get_parameter(name).data.copy_(plain.get_parameter(name).data)


def test_a_configuration_taken_to_another_model_claims_no_anchor(tmp_path: Path) -> None:
    model = start(llama(), METHODS["anchored"], small())
    other = start(llama(), METHODS["anchored"], small(), adapter_name="mine")
    other.add_adapter("default", model.peft_config["default"])
    other.save_pretrained(tmp_path)
    assert not (tmp_path / "lorainit.json").exists()
    assert model.peft_config["default"].origin.anchored


# Combinations


def two() -> PeftModel:
    model = start(llama(), METHODS["anchored"], small(), adapter_name="first")
    train(model, rate=0.01)
    start(model, METHODS["anchored-weight"], small(), adapter_name="second")
    model.set_adapter("second")
    return train(model, rate=0.01, seed=5)


@pytest.mark.parametrize("combination", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_pruning_factor_by_factor_is_refused(combination: str) -> None:
    model = two()
    with pytest.raises(AdapterError, match=f"{combination}_svd"):
        model.add_weighted_adapter(
            ["first", "second"], [0.5, 0.5], "both", combination, density=0.5
        )
    assert list(model.peft_config) == ["first", "second"]
    assert all("both" not in layer.r for layer in layers(model))
    model.add_weighted_adapter(["first"], [0.5], "one", combination, density=0.5)
    for found, expected in zip(deltas(model, "one"), deltas(model, "first"), strict=True):
        torch.testing.assert_close(found, 0.5 * expected, rtol=1e-4, atol=1e-6)


def test_pruning_factor_by_factor_would_prune_the_start_too() -> None:
    """The negative control: what stock PEFT makes of the same numbers is far from the change."""
    model = two()
    first = deltas(model, "first")
    model.base_model.__class__ = peft.LoraModel
    model.add_weighted_adapter(
        ["first", "second"], [1.0, 0.0], "both", "magnitude_prune", density=0.5
    )
    errors = [
        (found - delta).norm() / delta.norm()
        for found, delta in zip(deltas(model, "both"), first, strict=True)
    ]
    assert max(errors) > 3


@pytest.mark.parametrize("combination", ["ties_svd", "magnitude_prune_svd", "svd", "cat"])
def test_combinations_of_the_change_are_exact(combination: str) -> None:
    """Against the same operation on the deltas themselves."""
    model = two()
    parts = [deltas(model, name) for name in ("first", "second")]
    weights = torch.tensor([0.7, 0.4])
    model.add_weighted_adapter(
        ["first", "second"], weights.tolist(), "both", combination, svd_rank=32, density=0.5
    )
    for found, *pair in zip(deltas(model, "both"), *parts, strict=True):
        if combination == "ties_svd":
            expected = peft.utils.merge_utils.ties(pair, weights, density=0.5)
        elif combination == "magnitude_prune_svd":
            expected = peft.utils.merge_utils.magnitude_prune(pair, weights, density=0.5)
        else:
            expected = weights[0] * pair[0] + weights[1] * pair[1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("combination", ["svd", "dare_linear_svd"])
def test_combinations_of_twice_a_rank_that_a_layer_does_not_have(combination: str) -> None:
    """PEFT's default rank is the adapters' own, here 40 of layers of 32."""
    model = start(llama(), METHODS["anchored-weight"], small(r=20), adapter_name="first")
    start(model, METHODS["anchored"], small(r=20), adapter_name="second")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    parts = [deltas(model, name) for name in ("first", "second")]
    model.add_weighted_adapter(["first", "second"], [0.7, 0.4], "both", combination, density=1.0)
    assert model.peft_config["both"].r == 40
    for found, first, second in zip(deltas(model, "both"), *parts, strict=True):
        assert first.norm() > 0.1
        torch.testing.assert_close(found, 0.7 * first + 0.4 * second, rtol=1e-4, atol=1e-5)


# The names of things


def test_status_of_an_anchored_model_is_that_of_a_plain_one() -> None:
    model = start(llama(), METHODS["anchored"], small())
    plain = peft.get_peft_model(llama(), small())
    assert type(model.base_model) is not type(plain.base_model)
    assert model.get_model_status() == plain.get_model_status()
    assert model.get_model_status().adapter_model_type == "LoraModel"


# The side file


def test_a_side_file_is_believed_with_its_own_weights_alone(tmp_path: Path) -> None:
    model = train(start(llama(), METHODS["anchored"], small()))
    model.save_pretrained(tmp_path)
    assert is_anchored(layers(lorainit.load_adapter(llama(), tmp_path))[0], "default")
    stock = train(peft.get_peft_model(llama(), small(r=8, lora_alpha=16)))
    stock.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="other weights"):
        lorainit.load_adapter(llama(), tmp_path)
    loaded = lorainit.load_adapter(llama(), tmp_path, anchored=False)
    assert loaded.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    torch.testing.assert_close(logits(loaded), logits(stock), **CLOSE)


def test_a_side_file_that_names_no_weights_is_not_believed(tmp_path: Path) -> None:
    model = start(llama(), METHODS["anchored"], small())
    model.save_pretrained(tmp_path)
    file = tmp_path / "lorainit.json"
    content = json.loads(file.read_text())
    for change in ({"weights_sha256": None}, {"anchored": "false"}):
        file.write_text(json.dumps(content | change))
        with pytest.raises(AdapterError, match="anchored=True or anchored=False"):
            lorainit.load_adapter(llama(), tmp_path)
        again = lorainit.load_adapter(llama(), tmp_path, anchored=True)
        trainable = model.get_nb_trainable_parameters()[0]
        assert again.get_nb_trainable_parameters()[0] == trainable


# A restart after the optimizer was made


@pytest.mark.parametrize("old", ["anchored", "zero-b", "displaced"])
@pytest.mark.parametrize("new", ["anchored", "anchored-weight", "zero-b", "displaced"])
def test_a_restart_writes_into_the_parameters_that_the_optimizer_holds(old: str, new: str) -> None:
    model = start(llama(), METHODS[old], small())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    start(model, METHODS[new], adapter_name="default")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == held
    for step in range(3):
        optimizer.zero_grad()
        model(**batch(seed=2 + step)).loss.backward()
        optimizer.step()
    assert torch.equal(logits(model), logits(train(start(llama(), METHODS[new], small()))))
