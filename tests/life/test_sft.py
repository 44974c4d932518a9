"""trl.SFTTrainer with a ready PeftModel: completions and chats, cut and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel

from tests.adapters import tiny
from tests.fresh import run_forked

pytest.importorskip("trl")
from tests.life import sft

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_only_answers_are_labels(form: str, tmp_path: Path) -> None:
    """The negative control of what follows: the batches are what we think they are."""
    answers = {a.split()[0] for _, a in sft.texts()}
    words = sft.tokenizer()
    for batch in sft.batches(form, tmp_path):
        assert (batch["labels"] == -100).any()
        for row in batch["labels"]:
            kept = words.convert_ids_to_tokens(row[row != -100].tolist())
            assert kept[0] in answers
            assert kept[-1] == "<eos>"


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        pytest.param("displaced", "completion", marks=pytest.mark.slow),
        ("anchored", "completion"),
        ("anchored", "chat"),
    ],
)
def test_sft_cut_and_resumed_in_a_fresh_process(kind: str, form: str, tmp_path: Path) -> None:
    whole = sft.started(kind, form, tmp_path / "data")
    if kind == "anchored":
        assert torch.equal(tiny.logits(whole), tiny.logits(tiny.llama()))
    before = tiny.base_weights(whole)
    uninterrupted = sft.run(whole, tmp_path / "whole", form)
    assert len(uninterrupted) == sft.STEPS
    assert uninterrupted[-1] < uninterrupted[0]
    tiny.assert_same_bits(before, tiny.base_weights(whole))

    sft.run(sft.started(kind, form, tmp_path / "data"), tmp_path / "cut", form, stop=True)
    found = run_forked(
        """
        from pathlib import Path
        from tests.adapters import tiny
        from tests.life import sft
        model = sft.started(kind, form, Path(root) / "data")
        losses = sft.run(model, Path(root) / "cut", form, resume=True)
        result = {"losses": losses, "logits": tiny.logits(model).double().flatten().tolist()}
        """,
        kind=kind,
        form=form,
        root=str(tmp_path),
    )
    assert found["losses"] == uninterrupted
    assert found["logits"] == tiny.logits(whole).double().flatten().tolist()
    checkpoint = tmp_path / "cut" / f"checkpoint-{sft.STEPS}"
    stock = PeftModel.from_pretrained(tiny.llama(), checkpoint)
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(whole), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    losses = [
        sft.run(
            sft.started("anchored", "completion", tmp_path / "data"),
            tmp_path / str(checkpointing),
            "completion",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            save_strategy="no",
            max_steps=3,
        )
        for checkpointing in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("kind", ["displaced", "anchored"])
def test_best_model_at_end_under_bfloat16_autocast(kind: str, tmp_path: Path) -> None:
    model = sft.started(kind, "completion", tmp_path / "data")
    running = sft.trainer(
        model,
        tmp_path / "run",
        "completion",
        bf16=True,
        max_steps=4,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        # Training gets better, so that the worst is not the last.
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    running.train()
    best = running.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-4")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert running.evaluate()["eval_loss"] == pytest.approx(running.state.best_metric, rel=1e-6)
    # Trainer leaves its autocast on the model's forward.
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    stock = PeftModel.from_pretrained(tiny.llama(), best)
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(model), rtol=1e-5, atol=2e-6)
