"""What is measured through a trainer is what single examples give with the loss written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorainit
from tests.adapters import tiny

pytest.importorskip("trl")
from tests.trainers import singles, trl_trainers
from tests.trainers.singles import Recording, distance

pytestmark = pytest.mark.filterwarnings("ignore")

SAME = 1e-5
LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "sft": (singles.completion_loss, "sft"),
    "sft-chat": (singles.completion_loss, "sft-chat"),
    "sft-packed": (singles.completion_loss, "sft"),
    "sft-padding-free": (singles.completion_loss, "sft"),
    "sft-streaming": (singles.completion_loss, "sft"),
    "dpo": (singles.preference_loss, "dpo"),
    "dpo-precomputed": (singles.preference_loss, "dpo"),
    "kto": (singles.unpaired_loss, "kto"),
    "orpo": (singles.odds_ratio_loss, "orpo"),
    "reward": (singles.reward_loss, "reward"),
}
# Its first term is a mean over all tokens of a batch.
BATCH_SIZES = {"orpo": 1}


def measured(trainer: Any, **options: Any) -> Recording:
    recording = Recording()
    lorainit.start_trainer(trainer, recording, fit_heads=False, progress=False, **options)
    return recording


def expected(kind: str, rows: list[Any], loss_fn: Callable[..., Any]) -> Recording:
    recording = Recording()
    lorainit.get_peft_model(
        trl_trainers.base(kind),
        tiny.config(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM"),
        method=recording,
        # A list is no dictionary of tensors, so the loss function takes it as it is.
        data=[[row] for row in rows],
        loss_fn=lambda model, batch: loss_fn(model, batch[0]),
        fit_heads=False,
        progress=False,
    )
    return recording


@pytest.mark.parametrize("kind", LOSSES)
def test_statistics_are_those_of_single_examples(kind: str, tmp_path: Path) -> None:
    loss_fn, source = LOSSES[kind]
    trainer = trl_trainers.build(
        kind, tmp_path, per_device_train_batch_size=BATCH_SIZES.get(kind, 4)
    )
    found = measured(trainer)
    rows = list(trl_trainers.build(source, tmp_path).train_dataset)
    assert len(rows) == trl_trainers.ROWS
    assert distance(found, expected(kind, rows, loss_fn)) < SAME
    # Negative control: one example fewer is another task.
    assert distance(found, expected(kind, rows[1:], loss_fn)) > 1e-3


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_on_policy_statistics_are_the_policy_gradients(kind: str, tmp_path: Path) -> None:
    trainer = trl_trainers.build(kind, tmp_path)
    batches: list[dict[str, Any]] = []
    prepare = trainer._prepare_inputs

    def spying(prompts: Any) -> Any:
        batches.append(prepare(prompts))
        return batches[-1]

    trainer._prepare_inputs = spying
    found = measured(trainer)
    rows = [row for batch in batches for row in _completions(kind, batch, trainer)]
    assert len(rows) >= trl_trainers.ROWS
    assert any(row["advantage"] != 0 for row in rows)
    assert distance(found, expected(kind, rows, singles.policy_loss)) < SAME
    flipped = [row | {"advantage": abs(row["advantage"])} for row in rows]
    assert distance(found, expected(kind, flipped, singles.policy_loss)) > 1e-3


def _completions(kind: str, batch: dict[str, Any], trainer: Any) -> list[dict[str, Any]]:
    """Each completion with its advantage; GRPO's default loss divides by the tokens of the whole rollout."""
    count = len(batch["advantages"])
    weight = 1.0
    if kind == "grpo":
        weight = count * trainer.args.steps_per_generation / float(batch["num_items_in_batch"])
    kept = {
        name: [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
        ]
        for name in ("prompt", "completion")
    }
    return [
        {"prompt": kept["prompt"][i], "completion": kept["completion"][i], "weight": weight}
        | {"advantage": float(batch["advantages"][i])}
        for i in range(count)
    ]


def test_the_models_own_loss_where_that_is_asked_for(tmp_path: Path) -> None:
    """Trainers of the model's own loss give one gradient by both ways, if a batch is one example."""
    one = {"per_device_train_batch_size": 1}
    own = measured(trl_trainers.build("sft", tmp_path, **one))
    by_trainer = measured(trl_trainers.build("sft", tmp_path, **one), loss="trainer")
    assert distance(by_trainer, own) < SAME
    # A batch of several is one unit then, with the trainer's mean over all of its tokens.
    assert distance(measured(trl_trainers.build("sft", tmp_path), loss="trainer"), own) > 1e-3
