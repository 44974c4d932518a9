"""Embeddings as linear layers over one-hot inputs: their statistics, against autograd and one-hot matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.models.embedding import unserved_embedding
from lorainit.types import Diagonal
from tests.statistics import models, reference
from tests.statistics.models import VOCABULARY, batches, sequences
from tests.statistics.test_against_autograd import assert_close, assert_true, collect

F64 = torch.float64
ROWS = sequences(6)


def config(*names: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(names))


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("side", ["right", "left"])
def test_words_of_a_language_model(size: int, side: str) -> None:
    """Its padding token is the embedding's padding_idx, which never learns."""
    model = models.llama(F64)
    data = batches(ROWS, size, side=side, extra=2)
    found = collect(model, data, config=config("embed_tokens", "q_proj"))
    assert_true(found, reference.reference(model, list(found), data, reference.causal))
    layer = found["model.embed_tokens"]
    assert layer.input_second_moment_sum is None
    assert layer.input_counts is not None
    assert layer.input_counts.shape == (VOCABULARY,)
    words = {int(w) for row in ROWS for w in row["input_ids"].flatten()}
    unseen = sorted(set(range(VOCABULARY)) - words)
    assert unseen
    assert float(layer.gradient[:, unseen].abs().max()) == 0
    assert float(layer.input_counts[unseen].abs().max()) == 0
    # The control: where padding counted, so would positions.
    plain = [{k: v for k, v in b.items() if k != "attention_mask"} for b in data]
    assert collect(model, plain, config=config("embed_tokens"))["model.embed_tokens"].positions > (
        layer.positions
    )


@pytest.mark.parametrize("size", [1, 4])
def test_positions_that_are_looked_up_once_for_all_count_for_each(size: int) -> None:
    """GPT-2's table of positions is read by ``(1, length)`` numbers: by batches of one, or of more."""
    model = models.gpt2(F64, tie_word_embeddings=False)
    names = ("wte", "wpe")
    data = batches(ROWS, size)
    found = collect(model, data, config=config(*names))
    alone = batches(ROWS, 1)
    assert_true(found, reference.reference(model, list(found), alone, reference.causal))


def test_bert_has_three_tables() -> None:
    model = models.bert(F64, "TokenClassification", num_labels=VOCABULARY)
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    found, alone = (collect(model, batches(ROWS, size), config=config(*names)) for size in (6, 1))
    assert len(found) == 3
    for name, layer in found.items():
        assert_close(layer.gradient, alone[name].gradient, name)
        assert_close(layer.output_second_moment, alone[name].output_second_moment, name)
        assert torch.equal(layer.input_counts, alone[name].input_counts)
        assert (
            layer.positions
            == alone[name].positions
            == sum(row["input_ids"].numel() for row in ROWS)
        )


def test_a_tied_head_has_no_part_in_it() -> None:
    """The adapter changes what is looked up, not what the head multiplies by."""
    model = models.llama(F64, tie_word_embeddings=True)
    data = batches(ROWS, 3)
    found = collect(model, data, config=config("embed_tokens"))["model.embed_tokens"]
    weight = model.model.embed_tokens.weight
    apart = weight.detach().clone().requires_grad_()
    total: Any = 0.0
    for batch in data:
        rows = nn.functional.embedding(batch["input_ids"], apart, padding_idx=0)
        inputs = {k: v for k, v in batch.items() if k in ("attention_mask",)}
        logits = model(inputs_embeds=rows, **inputs).logits[:, :-1]
        total = total + sum(x for x in reference._rows(logits, batch["labels"][:, 1:], False))
    (lookups,) = torch.autograd.grad(total / len(ROWS), [apart])
    # Norms of transformers round to float32 inside a float64 model.
    assert float((found.gradient - lookups.mT).norm() / lookups.norm()) < 1e-6
    losses = [loss for b in data for loss in reference.causal(model, b)]
    (both,) = torch.autograd.grad(sum(losses) / len(ROWS), [weight])  # type: ignore[call-overload]
    assert float((both - lookups).norm() / both.norm()) > 0.1


def test_scaled_words() -> None:
    """Gemma multiplies what it looks up, and PEFT its adapter alike."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = Scaled(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(torch.tanh(self.words(x)).mean(1))
            return scores

    def losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    torch.manual_seed(0)
    model = Model().double()
    data = [{"x": torch.randint(0, 9, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}]
    found = collect(model, data, config=config("words"), loss_fn=losses)
    truth = reference.reference(model, ["words"], data, lambda m, b: list(losses(m, b)))
    assert_true(found, truth)


def test_lookups_that_all_sequences_share_are_left_out_and_named() -> None:
    """T5's bias of relative positions is one table of pairs for the whole batch."""
    model = models.t5(F64)
    found = collect(
        model, models.seq2seq(sequences(4), 3), config=config("relative_attention_bias", "q")
    )
    named = {n: r for n, r in found.metadata["unused_reasons"].items() if "relative" in n}
    assert len(named) == 2
    assert set(named.values()) == {"it looks up what all sequences of a batch share"}


def test_saved_and_read_again(tmp_path: Path) -> None:
    model, data = models.llama(F64), batches(ROWS, 3)
    found = collect(model, data, config=config("embed_tokens", "q_proj"))
    found.save(tmp_path / "words.safetensors")
    read = lorainit.Statistics.load(tmp_path / "words.safetensors")
    layer, again = (s["model.embed_tokens"] for s in (found, read))
    assert torch.equal(layer.input_counts, again.input_counts)
    assert isinstance(again.input_second_moment, Diagonal)
    assert_close(again.gradient, layer.gradient, "G")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_dtype(dtype: Any) -> None:
    model, data = models.llama(torch.float32), batches(ROWS, 3)
    found = collect(model, data, config=config("embed_tokens"), gradient_dtype=dtype)
    exact = collect(models.llama(F64), data, config=config("embed_tokens"))
    a, b = (s["model.embed_tokens"].gradient.double() for s in (found, exact))
    error = float((a - b).norm() / b.norm())
    assert error < (1e-5 if dtype == "float32" else 1e-2)
    assert (error > 1e-4) == (dtype == "bfloat16")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"max_norm": 1.0}, "shortens"), ({"scale_grad_by_freq": True}, "divided by how often")],
)
def test_what_is_no_linear_layer_is_left_out(settings: dict[str, Any], reason: str) -> None:
    assert reason in str(unserved_embedding(nn.Embedding(5, 3, **settings)))
    assert unserved_embedding(nn.Embedding(5, 3, padding_idx=1)) is None


def test_a_lookup_of_another_rule_is_left_out() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 1)

    assert "a rule of its own" in str(unserved_embedding(Shifted(5, 3)))
