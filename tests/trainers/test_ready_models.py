"""What TRL's trainers compare with where a started adapter is given to them (CASES C1)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.adapters import tiny

pytest.importorskip("trl")
from tests.trainers import trl_trainers

pytestmark = pytest.mark.filterwarnings("ignore")

# On-policy trainers have a reference where beta > 0 alone.
CHANGES = {"dpo": {}, "kto": {}, "grpo": {"beta": 0.1}, "rloo": {"beta": 0.1}}


@pytest.mark.parametrize("start", ["zero-b", "displaced", "anchored"])
@pytest.mark.parametrize("kind", CHANGES)
def test_the_reference_is_the_start_and_does_not_learn(
    kind: str, start: str, tmp_path: Path
) -> None:
    """Of a model that has learned a little, so that reference, base and start differ."""
    ready = tiny.train(tiny.start(tiny.llama(), tiny.METHODS[start]))
    before, base = tiny.logits(ready), tiny.logits(tiny.llama())
    assert not torch.allclose(before, base, atol=1e-3)
    trainable = [n for n, p in ready.named_parameters() if p.requires_grad]
    trainer = trl_trainers.build(
        kind, tmp_path, model=copy.deepcopy(ready), max_steps=2, save_strategy="no", **CHANGES[kind]
    )
    model = trainer.model
    model.set_adapter("ref")
    assert torch.equal(tiny.logits(model), before)
    model.set_adapter("default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    trainer.train()
    assert not torch.equal(tiny.logits(model), before)
    model.set_adapter("ref")
    assert torch.equal(tiny.logits(model), before)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
