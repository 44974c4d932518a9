"""`Random` beside the start that it takes its sizes from, through the whole line."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.cli.choices import method_of
from tests.adapters import tiny

Pairs = dict[str, tuple[Tensor, Tensor]]


def data() -> list[dict[str, Tensor]]:
    """Four of the vocabulary's words alone: there is something to learn at once."""
    batches = [tiny.batch(rows=8, seed=seed) for seed in range(4)]
    for batch in batches:
        batch["input_ids"] = batch["input_ids"] % 4 + batch["attention_mask"]
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batches


def pairs(method: object, **settings: object) -> Pairs:
    torch.manual_seed(0)
    given = {"data": data(), **settings}
    wrapped = lorainit.get_peft_model(
        tiny.llama(),
        tiny.config(),
        method=method,
        progress=False,
        **given,  # type: ignore[arg-type]
    )
    layers = {n: m for n, m in wrapped.named_modules() if getattr(m, "r", None)}
    return {
        n: tuple(getattr(m, f"lora_{f}")["default"].weight.detach().double() for f in "AB")
        for n, m in layers.items()
    }  # type: ignore[return-value]


def test_measured_start_and_its_control_have_the_same_sizes() -> None:
    """Natural's length, measured, and redistributed ranks come along; its directions do not."""
    like = lorainit.Natural(rho=2.0)
    theirs, ours = pairs(like), pairs(lorainit.Random(like=like))
    assert theirs.keys() == ours.keys()
    assert len({len(a) for a, _ in theirs.values()}) > 1
    moved = 0
    for name, (a, b) in theirs.items():
        other_a, other_b = ours[name]
        assert b.any()
        assert other_a.shape == a.shape
        torch.testing.assert_close(other_a @ other_a.mT, a @ a.mT, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other_b.mT @ other_b, b.mT @ b, rtol=1e-5, atol=1e-7)
        cosine = (other_a * a).sum() / a.square().sum()
        moved += abs(float(cosine)) < 0.5
    assert moved == len(theirs)


def test_the_loss_before_the_first_step_is_the_directions() -> None:
    """What was measured lowers the loss; as long a step in random directions does not."""
    torch.manual_seed(0)
    losses = {}
    batch = data()[0]
    for method in (lorainit.Natural(), lorainit.Random(like=lorainit.Natural())):
        wrapped = lorainit.get_peft_model(
            tiny.llama(), tiny.config(), method=method, data=data(), progress=False
        )
        with torch.no_grad():
            losses[type(method).__name__] = float(wrapped(**batch).loss)
    with torch.no_grad():
        base = float(tiny.llama()(**batch).loss)
    assert losses["Natural"] < base
    assert base - losses["Random"] < (base - losses["Natural"]) / 4


def test_a_refused_start_is_refused_for_the_control_too() -> None:
    """Auto that takes nothing is plain LoRA, and so is its control: ``B = 0`` and PEFT's own draw."""
    never = lorainit.Auto(least_gain=0.999)
    theirs, ours = pairs(never), pairs(lorainit.Random(like=never))
    for name, (a, b) in theirs.items():
        assert not b.any()
        assert torch.equal(ours[name][0], a)
        assert torch.equal(ours[name][1], b)


def test_anchored_control_keeps_the_outputs(caplog: pytest.LogCaptureFixture) -> None:
    batch = data()[0]
    with caplog.at_level(logging.INFO, "lorainit"):
        wrapped = lorainit.get_peft_model(
            tiny.llama(), tiny.config(), method=lorainit.Random(like="pissa"), progress=False
        )
    assert "Random: 14 layers started" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**batch).logits, tiny.llama()(**batch).logits)


def test_without_data_the_length_is_the_others_stated_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    natural = lorainit.Natural()
    statistics = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=data(), needs=natural.needs, progress=False
    )
    given = {"data": None, "statistics": statistics}
    theirs, ours = pairs(natural, **given), pairs(lorainit.Random(), **given)
    assert "there is no data to measure the length" in caplog.text
    for name, (a, b) in theirs.items():
        sizes = (torch.linalg.matrix_norm(y @ x) for x, y in ((a, b), ours[name]))
        assert next(sizes) == pytest.approx(float(next(sizes)), rel=1e-5)


def test_settings_are_written_with_the_other_methods_own(tmp_path) -> None:  # type: ignore[no-untyped-def]
    method = lorainit.Random(like=lorainit.LoraDA(beta=0.5), seed=3)
    settings = lorainit.types.settings_of(method)
    assert settings["like"]["method"] == "LoraDA"  # type: ignore[index]
    del settings["method"]
    assert lorainit.Random(**settings) == method  # type: ignore[arg-type]
    wrapped = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=method, data=data(), progress=False
    )
    wrapped.save_pretrained(tmp_path)
    assert '"beta": 0.5' in (tmp_path / "lorainit.json").read_text()


def test_the_command_line_takes_the_others_name() -> None:
    options = argparse.Namespace(
        method="random", paper=False, set={"like": "lora-one", "seed": "2"}
    )
    assert method_of(options) == lorainit.Random(like=lorainit.LoraOne(), seed=2)


def test_layers_of_unlike_weights_get_unlike_directions() -> None:
    """In one stack, and the same as alone; equal weights would get equal ones."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 12, 20, generator=generator)
    both = torch.stack([weights[0], weights[1], weights[0]])
    found = lorainit.Random(like="pissa").solve(both, lorainit.LayerStatistics(), 3, 1.0)
    alone = lorainit.Random(like="pissa").solve(weights[1], lorainit.LayerStatistics(), 3, 1.0)
    torch.testing.assert_close(found.A[1], alone.A)
    assert torch.equal(found.A[0], found.A[2])
    assert not torch.allclose(found.A[0], found.A[1], atol=0.1)
