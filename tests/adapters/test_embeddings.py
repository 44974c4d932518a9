"""Adapters of embeddings: starts in PEFT's own layout, of the words seen, through an adapter's life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorainit
from lorainit.errors import StatisticsFileError, TargetError
from lorainit.methods import METHODS
from tests.adapters.tiny import METHODS as KINDS
from tests.adapters.tiny import (
    VOCABULARY,
    assert_same_bits,
    base_weights,
    batch,
    config,
    llama,
    logits,
    start,
    train,
)
from tests.methods.common import relative

TARGETS = ["embed_tokens", "q_proj"]
PLACED = {
    "displaced": lorainit.LoraDA(),
    "zero-b": lorainit.EVA(rho=1.0),
    "gradient": lorainit.LoraOne(),
    "steps": lorainit.Natural(steps=2, least_gain=0.0),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def seen(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Which words occur where they attend."""
    counts = torch.zeros(VOCABULARY, dtype=torch.long)
    for one in batches:
        counts += torch.bincount(
            one["input_ids"][one["attention_mask"].bool()], minlength=VOCABULARY
        )
    return counts > 0


def pair(model: Any, name: str = "default") -> tuple[torch.Tensor, torch.Tensor]:
    layer = model.base_model.model.model.embed_tokens
    return layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()


@pytest.mark.parametrize("kind", list(PLACED))
@pytest.mark.parametrize("tied", [False, True])
def test_the_life_of_an_adapter(kind: str, tied: bool, tmp_path: Path) -> None:
    data = [batch(), batch(seed=5)]
    base = llama(tied=tied)
    before = base_weights(base)
    plain = logits(base)
    lora = config(target_modules=TARGETS)
    model = start(base, PLACED[kind], lora, data=data)
    a, b = pair(model)
    assert a.shape == (4, VOCABULARY)
    assert b.shape == (32, 4)
    words = seen(data)
    assert 0 < int(words.sum()) < VOCABULARY
    # Words never seen start as PEFT's do: their column is zero.
    assert float(a[:, ~words].abs().max()) == 0
    assert float(a[:, words].abs().max()) > 0
    if kind == "zero-b":
        assert torch.equal(logits(model), plain)
    elif kind != "steps":
        # Steps are measured, and may help nothing.
        assert not torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    train(model, rate=0.2)
    live = logits(model)
    model.save_pretrained(tmp_path / "saved")
    for read in (PeftModel.from_pretrained, lorainit.load_adapter):
        torch.testing.assert_close(
            logits(read(llama(tied=tied), tmp_path / "saved")), live, **CLOSE
        )
    lorainit.export(model, tmp_path / "served")
    served = PeftModel.from_pretrained(llama(tied=tied), tmp_path / "served")
    torch.testing.assert_close(logits(served), live, **CLOSE)
    assert_same_bits(before, base_weights(model))
    if not tied:
        torch.testing.assert_close(logits(model.merge_and_unload()), live, **CLOSE)


@pytest.mark.parametrize("name", ["lora-da", "eva", "lora-one", "cg-lora", "natural"])
def test_the_installed_pair_is_the_methods_answer_over_the_words_seen(name: str) -> None:
    method = lorainit.EVA(rho=1.0) if name == "eva" else METHODS[name]()
    data, lora = [batch(), batch(seed=5)], config(target_modules=TARGETS)
    found = lorainit.collect_statistics(
        llama(), lora, data=data, needs=method.needs, progress=False
    )
    layer = found["model.embed_tokens"]
    words = seen(data) | (torch.zeros(VOCABULARY) > 0)
    if layer.gradient_sum is not None:
        words |= layer.gradient_sum.ne(0).any(0)
    own = words.nonzero().squeeze(1)
    weight = llama().model.embed_tokens.weight.detach().mT[:, own]
    counts = None if layer.input_counts is None else layer.input_counts[own]
    dense = lorainit.LayerStatistics(
        gradient_sum=None if layer.gradient_sum is None else layer.gradient_sum[:, own].double(),
        input_second_moment_sum=None if counts is None else counts.double().diag(),
        input_sum=None if counts is None else counts.double(),
        output_second_moment_sum=layer.output_second_moment_sum,
        output_second_moment_diagonal_sum=layer.output_second_moment_diagonal_sum,
        sequences=layer.sequences,
        label_tokens=layer.label_tokens,
        positions=layer.positions,
        population=layer.population,
    ).to(dtype=torch.float64)
    wanted = method.solve(weight.double(), dense, 4, 2.0)
    model = start(llama(), method, lora, statistics=found, data=None, precision="exact")
    a, b = pair(model)
    if name == "eva":
        # Counts that are equal leave a choice: what is held of the variance is not one.
        covariance = dense.input_second_moment - torch.outer(dense.input_mean, dense.input_mean)
        held = [float((x @ covariance @ x.mT).trace()) for x in (a[:, own].double(), wanted.A)]
        assert held[0] == pytest.approx(held[1], rel=1e-6)
        return
    for got, true in ((b.double() @ a[:, own].double(), wanted.B @ wanted.A),):
        got, true = got / got.norm(), true / true.norm()
        assert relative(got, true) < 1e-4
    # The control: the words in another order are another answer.
    other = wanted.B @ wanted.A.flip(-1)
    assert relative(b.double() @ a[:, own].double() / other.norm(), other / other.norm()) > 0.1


@pytest.mark.parametrize("kind", ["anchored", "anchored-weight"])
def test_what_wants_an_anchor_leaves_the_embedding_and_says_so(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="lorainit"):
        model = start(llama(), KINDS[kind], config(target_modules=TARGETS))
    assert "model.embed_tokens: an embedding's factors can get no anchor" in caplog.text
    assert torch.equal(logits(model), logits(llama()))
    assert float(pair(model)[0].abs().max()) == 0
    assert pair(model)[0].shape[0] == 4


def test_new_words() -> None:
    """A resized vocabulary whose new words the data use: they are started as any other."""
    model = llama()
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    data = batch()
    data["input_ids"][:, 1] = VOCABULARY + 1
    data["labels"][:, 1] = VOCABULARY + 1
    lora = config(target_modules=[*TARGETS, "lm_head"])
    started = start(model, lorainit.LoraDA(), lora, data=[data])
    a, _ = pair(started)
    assert a.shape == (4, VOCABULARY + 3)
    assert float(a[:, VOCABULARY + 1].abs().max()) > 0
    assert float(a[:, [VOCABULARY, VOCABULARY + 2]].abs().max()) == 0


def test_pefts_own_ways_with_words_stay_pefts() -> None:
    for settings in (
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        {"modules_to_save": ["embed_tokens"]},
    ):
        model = start(llama(), lorainit.LoraDA(), config(target_modules=["q_proj"], **settings))
        names = [n for n, p in model.named_parameters() if p.requires_grad and "embed" in n]
        assert names
        assert not any("lora_embedding" in n for n in names)


def test_a_tie_that_peft_would_make_is_refused() -> None:
    lora = config(target_modules=[*TARGETS, "lm_head"], ensure_weight_tying=True)
    with pytest.raises(TargetError, match="shares its weight with the embedding"):
        start(llama(tied=True), lorainit.LoraDA(), lora)
    # An embedding of its own shares nothing.
    start(llama(), lorainit.LoraDA(), config(target_modules=TARGETS, ensure_weight_tying=True))


@pytest.mark.parametrize(
    "extra", [{"use_dora": True}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str
)
def test_variants(extra: dict[str, Any]) -> None:
    model = start(llama(), lorainit.LoraDA(), config(target_modules=TARGETS, **extra)).eval()
    live = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)


def test_fewer_words_than_the_rank() -> None:
    """The pair is filled up with words that were not seen."""
    data = batch(rows=2, length=6)
    data["input_ids"] = data["input_ids"].clamp(max=2)
    data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
    model = start(llama(), lorainit.LoraDA(), config(target_modules=TARGETS), data=[data])
    assert bool(torch.isfinite(logits(model)).all())
    assert pair(model)[0].shape == (4, VOCABULARY)


def test_statistics_of_another_vocabulary_are_refused() -> None:
    lora = config(target_modules=TARGETS)
    needs = lorainit.LoraDA().needs
    found = lorainit.collect_statistics(llama(), lora, data=[batch()], needs=needs, progress=False)
    larger = llama()
    larger.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    with pytest.raises(StatisticsFileError, match="made for another model"):
        start(larger, lorainit.LoraDA(), lora, statistics=found, data=None)
