"""Per-sequence losses: a model's own loss of a batch of one, whatever batch the sequence is in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorainit.data.packing import packed_segments
from lorainit.errors import DataError
from lorainit.models.introspection import innermost_model
from lorainit.statistics.loss.batch_loss import batch_loss, label_kind
from tests.statistics import models
from tests.statistics.models import VOCABULARY, batches, pad, sequences

Build = Callable[[], Any]
ROWS = sequences(5)
FEATURES = torch.randn(5, 8, 20, generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(4))


def with_labels(labels: Tensor) -> dict[str, Tensor]:
    return pad(ROWS) | {"labels": labels}


def bert(head: str, **settings: Any) -> Build:
    return lambda: models.bert(head=head, **settings)


CASES: dict[str, tuple[Build, dict[str, Tensor]]] = {
    "llama": (models.llama, pad(ROWS)),
    "gpt2": (models.gpt2, pad(ROWS)),
    "gpt2 classifies": (
        lambda: models.gpt2(head="ForSequenceClassification", num_labels=3),
        with_labels(torch.tensor([0, 2, 1, 1, 0])),
    ),
    "bert classifies": (
        bert("SequenceClassification", num_labels=3),
        with_labels(torch.tensor([0, 2, 1, 1, 0])),
    ),
    "bert regresses": (
        bert("SequenceClassification", num_labels=1),
        with_labels(torch.randn(5, generator=torch.Generator().manual_seed(5))),
    ),
    "bert with several labels": (
        bert("SequenceClassification", num_labels=3),
        with_labels((torch.arange(15).reshape(5, 3) % 2).float()),
    ),
    "bert tags tokens": (bert("TokenClassification", num_labels=VOCABULARY), pad(ROWS)),
    "bert fills masks": (bert("MaskedLM"), pad(ROWS)),
    "t5": (models.t5, models.seq2seq(ROWS, 5)[0]),
    "vit": (models.vit, {"pixel_values": IMAGES, "labels": torch.tensor([0, 2, 1, 1, 0])}),
    "whisper": (
        models.whisper,
        {"input_features": FEATURES, "labels": torch.arange(3, 28).reshape(5, 5)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_models_own_loss_of_one_sequence(case: str) -> None:
    build, batch = CASES[case]
    model = build()
    with torch.no_grad():
        together = batch_loss(model, batch, "sequence").per_sequence
        alone = [float(model(**{k: v[i : i + 1] for k, v in batch.items()}).loss) for i in range(5)]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=2e-5, atol=1e-6)
    assert float(together.std()) > 0


@pytest.mark.parametrize("case", ["llama", "bert tags tokens", "t5"])
def test_the_mean_loss_of_a_ragged_batch_is_another_number(case: str) -> None:
    build, batch = CASES[case]
    model = build()
    with torch.no_grad():
        mean = batch_loss(model, batch, "sequence").per_sequence.mean()
        own = model(**batch).loss
    assert abs(float(mean - own)) > 1e-4


def test_token_reduction_sums_and_counts_tokens() -> None:
    model, batch = models.llama(), pad(ROWS)
    with torch.no_grad():
        sums, means = (batch_loss(model, batch, r) for r in ("token", "sequence"))
        own = model(**batch).loss
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(sums.per_sequence, means.per_sequence * tokens)
    assert int(sums.label_tokens) == int(tokens.sum())
    torch.testing.assert_close(sums.per_sequence.sum() / tokens.sum(), own)


def test_a_model_leaves_its_configuration_alone() -> None:
    """transformers writes problem_type into the configuration when it is given labels."""
    build, batch = CASES["bert with several labels"]
    model = build()
    before = model.config.to_dict()
    batch_loss(model, batch, "sequence")
    assert model.config.to_dict() == before


def test_a_renamed_subclass_is_what_its_parent_is() -> None:
    model = models.bert(head="TokenClassification", num_labels=3)
    model.__class__ = type("Tagger", (type(model),), {})
    assert label_kind(model, torch.zeros(2, 5, dtype=torch.long)) == "aligned"


def test_wrappers_are_looked_through() -> None:
    model = models.bert(head="TokenClassification", num_labels=VOCABULARY)
    parallel = nn.DataParallel(model)
    assert innermost_model(parallel) is model
    compiled = torch.compile(model)
    assert innermost_model(compiled) is model
    alone = batch_loss(model, pad(ROWS), "sequence").per_sequence
    torch.testing.assert_close(batch_loss(parallel, pad(ROWS), "sequence").per_sequence, alone)


@pytest.mark.parametrize("length", [0, 1])
def test_sequences_too_short_to_predict_anything_have_no_labels(length: int) -> None:
    ids = torch.ones(2, length, dtype=torch.long)

    class Model(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, VOCABULARY, requires_grad=True)

    result = batch_loss(Model(), {"input_ids": ids, "labels": ids}, "sequence")
    assert int(result.sequences) == int(result.label_tokens) == 0
    assert result.per_sequence.tolist() == [0.0, 0.0]


class Fixed(nn.Module):
    """Gives the same logits for whatever it gets."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return self.logits


class FixedForCTC(Fixed):
    """A model whose labels are a transcript, not one label a frame."""


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (Fixed(torch.zeros(2, 3, 7)), torch.zeros(2, 5, dtype=torch.long)),
        (Fixed(torch.zeros(2, 7)), torch.zeros(2, 5, dtype=torch.long)),
        (Fixed(torch.zeros(2, 7, 4, 4)), torch.zeros(2, 4, 4, dtype=torch.long)),
        (Fixed(torch.zeros(3, 7)), torch.zeros(2, dtype=torch.long)),
        (Fixed(torch.zeros(2, 3)), torch.zeros(2, 5)),
        (FixedForCTC(torch.zeros(2, 9, 7)), torch.zeros(2, 5, dtype=torch.long)),
    ],
    ids=["short", "flat", "segmentation", "other rows", "other width", "transcript"],
)
def test_labels_that_do_not_fit_are_refused(model: nn.Module, labels: Tensor) -> None:
    with pytest.raises(DataError, match=r"do not fit the logits of Fixed.*loss_fn="):
        batch_loss(model, {"labels": labels}, "sequence")


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(dict\) has no logits.*loss_fn="):
        batch_loss(Fixed({"scores": 1}), {"labels": torch.zeros(2, 5).long()}, "sequence")


class TestLossFunctions:
    """A user's loss, one number a sequence."""

    def test_rows_without_labels_do_not_count(self) -> None:
        labels = torch.tensor([[1, 2], [-100, -100], [-100, 3]])
        result = batch_loss(
            nn.Identity(), {"labels": labels}, "sequence", lambda model, batch: torch.ones(3)
        )
        assert int(result.sequences) == 2
        assert int(result.label_tokens) == 3

    def test_without_labels_every_row_counts(self) -> None:
        result = batch_loss(nn.Identity(), {}, "sequence", lambda model, batch: torch.ones(3))
        assert int(result.sequences) == int(result.label_tokens) == 3

    @pytest.mark.parametrize("returned", [torch.tensor(1.0), torch.ones(2, 3), 1.0, None])
    def test_other_shapes_are_refused(self, returned: Any) -> None:
        def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
            return returned

        with pytest.raises(DataError, match="one loss per sequence"):
            batch_loss(nn.Identity(), {"labels": torch.ones(3, 2).long()}, "sequence", loss)


class TestPackedRows:
    """Sequences told apart inside a row."""

    @pytest.mark.parametrize("key", ["position_ids", "seq_idx", "cu_seq_lens_q"])
    def test_every_way_to_say_it(self, key: str) -> None:
        marks = {
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
            "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2]]),
            "cu_seq_lens_q": torch.tensor([0, 3, 5, 6], dtype=torch.int32),
        }
        segments, starts = packed_segments({key: marks[key]}, torch.zeros(1, 6))
        assert segments.tolist() == [[0, 0, 0, 1, 1, 2]]
        assert starts.nonzero()[:, 1].tolist() == [3, 5]

    def test_left_padding_is_no_start(self) -> None:
        batch = {
            "position_ids": torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        }
        segments, starts = packed_segments(batch, torch.zeros(2, 4))
        assert not starts.any()
        assert segments.tolist() == [[0] * 4, [1] * 4]

    def test_losses_are_those_of_the_sequences(self) -> None:
        model = models.llama(torch.float64)
        rows = [row | {"labels": row["input_ids"].clone()} for row in ROWS]
        packed = batch_loss(model, models.pack(rows), "sequence")
        alone = [batch_loss(model, batch, "sequence") for batch in batches(rows, 1)]
        expected = torch.cat([one.per_sequence for one in alone])
        torch.testing.assert_close(packed.per_sequence, expected, rtol=1e-6, atol=0)
        assert int(packed.label_tokens) == sum(int(one.label_tokens) for one in alone)
        assert int(packed.sequences) == len(rows)
