"""A reference that is the model with its adapter off is told apart from the policy, wherever the start is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lorainit
from lorainit.adapters import layers
from tests.adapters import tiny

pytest.importorskip("trl")
from tests.trainers import trl_trainers

pytestmark = pytest.mark.filterwarnings("ignore")

METHOD = lorainit.Natural()


def start(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """The factors of a start whose length is measured on the trainer's loss."""
    trainer = trl_trainers.build(kind, folder, **changes)
    # Larger steps of beta make a difference of the loss that float32 can tell.
    lorainit.start_trainer(trainer, METHOD, progress=False)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def largest(factors: dict[str, Tensor]) -> float:
    return max(float(p.abs().max()) for n, p in factors.items() if "lora_B" in n)


def test_start_is_that_of_precomputed_references(tmp_path: Path) -> None:
    inside = start("dpo", tmp_path, beta=1.0)
    before = start("dpo-precomputed", tmp_path, beta=1.0)
    assert largest(before) > 0
    for name, factor in before.items():
        torch.testing.assert_close(inside[name], factor, rtol=1e-4, atol=1e-6)


def test_without_the_mark_no_start_moves_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the reference then moves along, or has adapters switched on for the rest."""
    marked = start("dpo", tmp_path, beta=1.0)
    monkeypatch.setattr(layers, "_marked_references", lambda model: contextlib.nullcontext())
    unmarked = start("dpo", tmp_path, beta=1.0)
    assert largest(unmarked) == 0
    assert largest(marked) > 0


def test_a_loss_of_ones_own_finds_adapters_off_and_its_reference_too() -> None:
    """Over an adapter that was trained: the policy and the reference are the base."""
    model = tiny.train(tiny.start(tiny.llama(), lorainit.LoraDA()))
    inputs = {k: v for k, v in tiny.batch(seed=9).items() if k != "labels"}
    base = tiny.llama()(**inputs).logits
    assert not torch.allclose(model(**inputs).logits, base, atol=1e-3)
    with layers.adapters_disabled(model):
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, base)
            with model.disable_adapter():
                torch.testing.assert_close(model(**inputs).logits, base)
    assert "disable_adapter" not in vars(model)
    assert "set_adapter" not in vars(model)
    assert not torch.allclose(model(**inputs).logits, base, atol=1e-3)


def test_a_user_loss_with_a_reference_inside_is_measured_too() -> None:
    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        def log_probabilities() -> Tensor:
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            return -F.cross_entropy(
                logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
            ).sum(1)

        policy = log_probabilities()
        with torch.no_grad(), model.disable_adapter():
            reference = log_probabilities()
        return -F.logsigmoid(policy - reference)

    plain = tiny.start(tiny.llama(), lorainit.Vanilla())
    model = lorainit.get_peft_model(
        plain, None, method=METHOD, data=[tiny.batch(rows=16)], loss_fn=loss, progress=False
    )
    origin = model.peft_config["default"].origin
    assert origin.measured["start_loss"] < origin.measured["base_loss"] - 0.01


def test_a_copy_of_a_trained_adapter_is_no_reference_for_a_start(tmp_path: Path) -> None:
    ready = tiny.train(tiny.start(tiny.llama(), lorainit.LoraDA()))
    trainer = trl_trainers.build("dpo", tmp_path, model=ready)
    with pytest.raises(lorainit.errors.AdapterError, match="a copy of one that moves layer"):
        lorainit.start_trainer(trainer, METHOD, progress=False)


def test_a_copy_of_a_fresh_adapter_is_the_base(tmp_path: Path) -> None:
    fresh = tiny.start(tiny.llama(), lorainit.Vanilla())
    trainer = trl_trainers.build("dpo", tmp_path, model=fresh, beta=1.0)
    assert "ref" in trainer.model.peft_config
    lorainit.start_trainer(trainer, METHOD, progress=False)
    inside = start("dpo", tmp_path, beta=1.0)
    for name, factor in inside.items():
        torch.testing.assert_close(trainer.model.get_parameter(name), factor, rtol=1e-4, atol=1e-6)
