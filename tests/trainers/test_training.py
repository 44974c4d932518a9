"""Training that begins at the door is training of a model that was started before, digit for digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lorainit
from tests.adapters import tiny

pytest.importorskip("trl")
from tests.trainers import trl_trainers

pytestmark = pytest.mark.filterwarnings("ignore")

# The others start displaced.
ANCHORED = {"sft", "sft-packed", "grpo"}
# TRL copies a ready adapter to be the reference; here the reference is the base.
COMPARED = {"dpo", "dpo-precomputed", "kto", "rloo"}


def method_of(kind: str) -> Any:
    return lorainit.FILet() if kind in ANCHORED else lorainit.LoraDA()


def started(kind: str, folder: Path, **changes: Any) -> Any:
    trainer = trl_trainers.build(kind, folder, **changes)
    lorainit.start_trainer(trainer, method_of(kind), progress=False)
    return trainer


def ready(kind: str, folder: Path, adapter: Path) -> Any:
    """A trainer that is given the started adapter from its folder."""
    if kind in COMPARED:
        trainer = trl_trainers.build(kind, folder)
        trainer.model.load_adapter(adapter, "default", is_trainable=True)
        return trainer
    model = lorainit.load_adapter(trl_trainers.base(kind), adapter)
    return trl_trainers.build(kind, folder, model=model)


def trained(trainer: Any, resume: Path | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of every step, and what was learned."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    return losses, {n: trainer.model.get_parameter(n).detach().clone() for n in names}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


QUICK = {"sft-packed", "dpo", "grpo"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
        for kind in trl_trainers.BUILDERS
    ],
)
def test_door_equals_the_ready_model_and_resumes(kind: str, tmp_path: Path) -> None:
    door = started(kind, tmp_path / "door")
    door.model.save_pretrained(tmp_path / "start")
    before = tiny.base_weights(door.model)
    losses, learned = trained(door)
    assert len(losses) == trl_trainers.STEPS
    tiny.assert_same_bits(before, tiny.base_weights(door.model))

    beside = trained(ready(kind, tmp_path / "ready", tmp_path / "start"))
    assert beside[0] == losses
    assert same(beside[1], learned)

    half = tmp_path / "door" / f"checkpoint-{trl_trainers.STEPS // 2}"
    again = trained(started(kind, tmp_path / "again"), half)
    assert again[0] == losses
    assert same(again[1], learned)

    last = tmp_path / "door" / f"checkpoint-{trl_trainers.STEPS}"
    stock = PeftModel.from_pretrained(trl_trainers.base(kind), last)
    inputs = {k: v for k, v in tiny.batch(seed=9).items() if k != "labels"}
    with torch.no_grad():
        expected = door.model.eval()(**inputs).logits
        found = stock.eval()(**inputs).logits
    kept = inputs["attention_mask"].bool() if found.dim() == 3 else ...
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=2e-6)


def test_another_start_trains_otherwise(tmp_path: Path) -> None:
    """The negative control: what is compared above depends on the start."""
    plain = trained(trl_trainers.build("sft", tmp_path / "plain"))
    door = trained(started("sft", tmp_path / "door"))
    assert plain[0] != door[0]
    assert not same(plain[1], door[1])
