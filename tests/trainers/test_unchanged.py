"""A start leaves no trace in the trainer but the adapter."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import lorainit
from tests.adapters import tiny

pytest.importorskip("trl")
from tests.trainers import trl_trainers
from tests.trainers.singles import Recording

pytestmark = pytest.mark.filterwarnings("ignore")

PLAIN = (int, float, str, bool, type(None), dict, list, tuple, set, collections.deque)


def plain_attributes(trainer: Any) -> dict[str, str]:
    """Whatever the trainer keeps that can be written down."""
    return {
        name: repr(value)
        for name, value in vars(trainer).items()
        if isinstance(value, PLAIN) and name != "_created_lr_scheduler"
    }


def generators() -> list[Any]:
    state = numpy.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]]


def batches(trainer: Any) -> list[Any]:
    """What training would begin with; generators as they were."""
    with torch.random.fork_rng(devices=[]):
        found = next(iter(trainer.get_train_dataloader()))
    items = found if isinstance(found, list) else [found]
    return [
        {k: v.tolist() if isinstance(v, Tensor) else v for k, v in item.items()} for item in items
    ]


@pytest.mark.parametrize(
    "kind", ["sft-packed", "sft-streaming", "dpo", "kto", "orpo", "grpo", "rloo"]
)
def test_nothing_of_the_trainer_changes(kind: str, tmp_path: Path) -> None:
    trainer = trl_trainers.build(kind, tmp_path)
    order = batches(trl_trainers.build(kind, tmp_path))
    accelerator = trainer.accelerator
    kept = plain_attributes(trainer), generators(), len(accelerator._dataloaders)
    modes = [module.training for module in trainer.model.modules()]
    flags = [p.requires_grad for p in trainer.model.parameters()]
    lorainit.start_trainer(trainer, Recording(), progress=False)
    assert (plain_attributes(trainer), generators(), len(accelerator._dataloaders)) == kept
    assert [module.training for module in trainer.model.modules()] == modes
    assert [p.requires_grad for p in trainer.model.parameters()] == flags
    assert accelerator.gradient_state.active_dataloader is None
    assert not {"gather", "gather_for_metrics", "reduce"} & set(vars(accelerator))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert batches(trainer) == order


def test_what_is_compared_does_change_with_a_loss(tmp_path: Path) -> None:
    """The negative control: computing a loss by hand leaves metrics behind."""
    trainer = trl_trainers.build("dpo", tmp_path)
    kept = plain_attributes(trainer)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert plain_attributes(trainer) != kept


def test_an_error_leaves_everything_as_it_was(tmp_path: Path) -> None:
    trainer = trl_trainers.build("dpo", tmp_path)
    kept = plain_attributes(trainer), generators()
    factors = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    compute = trainer.compute_loss

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        compute(*args, **kwargs)
        raise RuntimeError("no memory")

    trainer.compute_loss = failing
    with pytest.raises(RuntimeError, match="no memory"):
        lorainit.start_trainer(trainer, Recording(), progress=False)
    del trainer.compute_loss
    assert (plain_attributes(trainer), generators()) == kept
    assert all(torch.equal(p, factors[n]) for n, p in trainer.model.named_parameters())
    assert tiny.logits(trainer.model).isfinite().all()
