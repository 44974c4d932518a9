"""transformers.Trainer: cut, killed, resumed in a fresh process, and the same as uninterrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

import lorainit
from tests.adapters import tiny
from tests.fresh import run_forked
from tests.life import trainer as life

pytestmark = pytest.mark.filterwarnings("ignore")

# In a fresh process: the script run again from its start; then the checkpoint alone, without data.
RESUME = """
    import lorainit
    from tests.adapters import tiny
    from tests.life import trainer as life
    life.seeded()
    model = life.started(kind)
    result = {"again": life.result(model, life.run(model, f"{root}/again", resume=True))}
    life.seeded()
    checkpoint = f"{root}/folder/checkpoint-{life.CUT}"
    model = lorainit.load_adapter(tiny.llama(), checkpoint)
    losses = life.run(model, f"{root}/folder", resume=checkpoint)
    result["folder"] = life.result(model, losses)
"""


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_killed_and_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    life.seeded()
    whole = life.started(kind)
    before = tiny.base_weights(whole)
    uninterrupted = life.run(whole, tmp_path / "whole")
    assert len(uninterrupted) == life.STEPS
    tiny.assert_same_bits(before, tiny.base_weights(whole))

    life.seeded()
    first = life.run(life.started(kind), tmp_path / "again", stop=life.CUT)
    assert first == uninterrupted[: life.CUT]
    shutil.copytree(tmp_path / "again", tmp_path / "folder")

    live = tiny.logits(whole).double().flatten().tolist()
    for name, found in run_forked(RESUME, kind=kind, root=str(tmp_path)).items():
        assert found["losses"] == uninterrupted[life.CUT :], name
        assert found["logits"] == live, name

    checkpoint = tmp_path / "whole" / f"checkpoint-{life.STEPS}"
    stock = PeftModel.from_pretrained(tiny.llama(), checkpoint)
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(whole), rtol=1e-5, atol=2e-6)


def test_a_process_that_dies_between_two_checkpoints(tmp_path: Path) -> None:
    """By a signal that nobody can catch, a step after the checkpoint: that step is done again."""
    life.seeded()
    whole = life.started("anchored")
    uninterrupted = life.run(whole, tmp_path / "whole")
    root = str(tmp_path)
    with pytest.raises(AssertionError):
        run_forked(
            """
            from tests.life import trainer as life
            life.seeded()
            life.run(life.started("anchored"), f"{root}/again", kill=life.CUT + 1)
            result = "alive"
            """,
            root=root,
        )
    assert [p.name for p in (tmp_path / "again").iterdir()] == [f"checkpoint-{life.CUT}"]
    life.seeded()
    model = life.started("anchored")
    assert life.run(model, tmp_path / "again", resume=True) == uninterrupted[life.CUT :]
    assert torch.equal(tiny.logits(model), tiny.logits(whole))


def test_stock_peft_would_train_the_anchor_too(tmp_path: Path) -> None:
    """The negative control of the above: what load_adapter is for."""
    life.seeded()
    model = life.started("anchored")
    life.run(model, tmp_path, stop=life.CUT)
    checkpoint = tmp_path / f"checkpoint-{life.CUT}"
    stock = PeftModel.from_pretrained(tiny.llama(), checkpoint, is_trainable=True)
    ours = lorainit.load_adapter(tiny.llama(), checkpoint)
    trainable = model.get_nb_trainable_parameters()[0]
    assert ours.get_nb_trainable_parameters()[0] == trainable
    assert stock.get_nb_trainable_parameters()[0] == 2 * trainable


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_load_best_model_at_end(kind: str, tmp_path: Path) -> None:
    life.seeded()
    model = life.started(kind)
    settings: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        # Training gets better, so that the worst is not the last.
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "max_steps": 4,
    }
    arguments = life.arguments(tmp_path, **settings)
    trainer = life.Trainer(
        model=model, args=arguments, train_dataset=life.Rows(), eval_dataset=life.Rows(seed=8)
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-4")
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(trainer.state.best_metric, rel=1e-6)
    stock = PeftModel.from_pretrained(tiny.llama(), best)
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(model), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: str, reentrant: bool, tmp_path: Path) -> None:
    losses = []
    for number, checkpointing in enumerate((False, True)):
        life.seeded()
        losses.append(
            life.run(
                tiny.start(tiny.llama(), tiny.METHODS[kind], tiny.config()),
                tmp_path / str(number),
                gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": reentrant},
                save_strategy="no",
                max_steps=3,
            )
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_bfloat16_autocast(kind: str, tmp_path: Path) -> None:
    life.seeded()
    model = life.started(kind)
    losses = life.run(model, tmp_path, bf16=True)
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    # Trainer leaves its autocast on the model's forward.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / f"checkpoint-{life.STEPS}")
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(model), rtol=1e-5, atol=2e-6)


@torch.no_grad()
def test_anchored_start_under_autocast_is_the_base() -> None:
    inputs = tiny.batch(seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped = tiny.start(tiny.llama(), tiny.METHODS["anchored"])
        assert torch.equal(wrapped.eval()(**inputs).logits, tiny.llama()(**inputs).logits)


def test_several_adapters_in_one_checkpoint(tmp_path: Path) -> None:
    """Trainer saves both and resumes both; the one that is not trained stays as it was."""

    def two() -> PeftModel:
        life.seeded()
        model = tiny.start(
            tiny.llama(), tiny.METHODS["displaced"], tiny.config(), adapter_name="fixed"
        )
        tiny.start(model, tiny.METHODS["anchored"], tiny.config(), adapter_name="trained")
        model.set_adapter("trained")
        return model

    whole = two()
    uninterrupted = life.run(whole, tmp_path / "whole")
    life.run(two(), tmp_path / "cut", stop=life.CUT)
    again = two()
    assert life.run(again, tmp_path / "cut", resume=True) == uninterrupted[life.CUT :]
    for name in ("trained", "fixed"):
        again.set_adapter(name)
        whole.set_adapter(name)
        assert torch.equal(tiny.logits(again), tiny.logits(whole))
