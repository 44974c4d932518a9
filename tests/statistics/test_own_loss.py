"""The loss is the model's own: compared on one sequence, taken one by one where it differs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.errors import DataError
from tests.statistics import models
from tests.statistics.kinds import KINDS, made, spans, together
from tests.statistics.models import all_linear

pytestmark = pytest.mark.filterwarnings("ignore")

SAID = "the default loss is not that of"


def collected(model: nn.Module, data: list[Any], **settings: Any) -> Any:
    settings = {"needs": {"gradient"}, "on_unused": "default", "progress": False} | settings
    return lorainit.collect_statistics(model, all_linear(), data=data, **settings)


def unshifted() -> Any:
    return made(KINDS["bart, causal"].build)


def rows_of(kind: str = "bart, causal") -> list[Any]:
    return KINDS[kind].rows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "bart, causal", "bert tags"])
def test_one_line_says_it(kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model = made(KINDS[kind].build).to(dtype)
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        collected(model, [together(rows_of(kind))])
    assert caplog.text.count(SAID) == int(KINDS[kind].own)


def test_a_loss_of_the_users_is_not_questioned(caplog: pytest.LogCaptureFixture) -> None:
    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return model(**batch).logits.sum((1, 2))  # type: ignore[no-any-return]

    with caplog.at_level(logging.WARNING, logger="lorainit"):
        collected(unshifted(), [together(rows_of())], loss_fn=loss)
    assert SAID not in caplog.text


def test_token_reduction_weighs_by_labels() -> None:
    """The sum over rows of the model's mean times its labels, over all labels."""
    model, rows = unshifted(), rows_of()
    found = collected(model, [together(rows)], loss_reduction="token")
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    assert len(set(counts)) > 1
    weight = model.model.decoder.layers[0].fc1.weight
    weight.requires_grad_(True)
    sum(model(**row).loss * n for row, n in zip(rows, counts, strict=True)).backward()
    layer = found["model.decoder.layers.0.fc1"]
    torch.testing.assert_close(layer.gradient, weight.grad / sum(counts), rtol=1e-4, atol=1e-7)
    assert layer.label_tokens == sum(counts)
    plain = collected(model, [together(rows)])["model.decoder.layers.0.fc1"]
    assert not torch.allclose(plain.gradient, layer.gradient, rtol=1e-2)


def test_token_reduction_of_labels_that_cannot_be_counted_is_refused() -> None:
    class Judged(nn.Module):
        """A loss of its own, and targets of its own name."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.outer = nn.Linear(3, 1)

        def forward(self, x: Tensor, y: Tensor, **_: Any) -> dict[str, Tensor]:
            return {"loss": (self.outer(self.inner(x)) - y).square().mean()}

    config = models.LoraConfig(r=1, target_modules=["inner"])
    model = Judged()
    data = [{"x": torch.randn(4, 5), "y": torch.randn(4, 1)}]
    settings: Any = {"data": data, "needs": {"gradient"}, "progress": False}
    found = lorainit.collect_statistics(model, config, **settings)["inner"]
    assert found.sequences == 4
    losses = [model(x[None], y[None])["loss"] for x, y in zip(*data[0].values(), strict=True)]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), model.inner.weight)
    torch.testing.assert_close(found.gradient, expected)
    with pytest.raises(DataError, match="loss_reduction='token' weighs the model's own loss"):
        lorainit.collect_statistics(model, config, **settings, loss_reduction="token")


def test_router_losses_follow_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    """Even one too small to be seen in the loss of a sequence."""
    build = KINDS["mixtral, router losses"].build
    for added, coefficient, said in ((True, 1e-6, 1), (False, 0.5, 0)):
        caplog.clear()
        model = made(build)
        model.config.output_router_logits = added
        model.router_aux_loss_coef = coefficient
        with caplog.at_level(logging.WARNING, logger="lorainit"):
            collected(model, [together(rows_of("llama"))])
        assert caplog.text.count("it adds its routers' loss") == said
        assert caplog.text.count(SAID) == said


def test_other_decoder_inputs_are_seen_where_all_losses_are_alike(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A head of zeros, nearly: any input gives the logarithm of the vocabulary."""

    class Starts(hf.T5ForConditionalGeneration):
        """Makes decoder inputs in its own way where it is given labels."""

        def forward(
            self,
            input_ids: Any = None,
            decoder_input_ids: Any = None,
            labels: Any = None,
            **named: Any,
        ) -> Any:
            if labels is not None:
                decoder_input_ids = labels.clamp_min(0).flip(1)
            named |= {"decoder_input_ids": decoder_input_ids, "labels": labels}
            return super().forward(input_ids, **named)

    rows = rows_of("t5")
    for build, said in ((Starts, 1), (hf.T5ForConditionalGeneration, 0)):
        caplog.clear()
        model = made(lambda build=build: build(made(KINDS["t5"].build).config))
        with torch.no_grad():
            model.lm_head.weight.mul_(1e-4)
        with caplog.at_level(logging.WARNING, logger="lorainit"):
            collected(model, rows)
        assert caplog.text.count("it makes other inputs of its labels") == said


def test_label_positions_of_another_loss_are_refused() -> None:
    with pytest.raises(DataError, match="token_mask='labels' counts the positions that predict"):
        collected(
            unshifted(), rows_of(), needs={"input_second_moment", "gradient"}, token_mask="labels"
        )
    routed = made(KINDS["mixtral, router losses"].build)
    found = collected(routed, rows_of("llama"), token_mask="labels")
    labelled = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows_of("llama"))
    assert found["model.layers.0.self_attn.q_proj"].positions == labelled


def test_sequences_that_cannot_run_apart_are_refused() -> None:
    batch = together(rows_of()) | {"images": torch.zeros(7, 2)}

    class Takes(hf.BartForCausalLM):
        def forward(self, *args: Any, images: Any = None, **named: Any) -> Any:
            return super().forward(*args, **named)

    model = made(lambda: Takes(unshifted().config))
    with pytest.raises(
        DataError, match="is a mean over batch 0, whose 4 sequences cannot run apart"
    ):
        collected(model, [batch])
    with pytest.raises(DataError, match="gives no loss of a batch"):
        lorainit.statistics.loss.own_loss.OwnLoss("sequence")(
            models.llama(), {"input_ids": torch.ones(1, 3).long()}
        )


def test_rows_without_a_label_are_left_out() -> None:
    rows = rows_of()
    batch = together(rows)
    batch["labels"][1] = -100
    found, expected = (
        collected(unshifted(), data)["model.decoder.layers.0.fc1"]
        for data in ([batch], [rows[0], *rows[2:]])
    )
    assert found.sequences == expected.sequences == 3
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-4, atol=1e-7)
    batch["labels"][:] = -100
    with pytest.raises(DataError, match="every label is masked"):
        collected(unshifted(), [batch])


def test_answer_spans_are_measured_and_started() -> None:
    """The held-back loss is the model's own, too."""
    model, rows = made(KINDS["bert spans"].build), spans() * 3
    own = [float(model(**row).loss.detach()) for row in rows]
    started = lorainit.get_peft_model(
        model,
        models.LoraConfig(r=2, target_modules=["query", "value"]),
        method=lorainit.Natural(),
        data=rows,
        calibration_share=0.25,
        progress=False,
    )
    measured = origin_of(started, "default").measured
    assert measured["base_loss"] == pytest.approx(sum(own[3::4]) / 3, rel=1e-5)
    assert measured["start_loss"] < measured["base_loss"]


def test_a_classifiers_configuration_is_not_written_to() -> None:
    """transformers notes what its first labels looked like."""
    model = models.bert(head="SequenceClassification", num_labels=3)
    data = models.classified(models.sequences(4), 3, 2)
    assert model.config.problem_type is None
    collected(model, data)
    assert model.config.problem_type is None
    model(**data[0])
    assert model.config.problem_type == "single_label_classification"


def test_the_first_sequence_may_be_bad(caplog: pytest.LogCaptureFixture) -> None:
    """One whose loss is not finite says nothing; the next is compared."""

    class Poisoned(hf.BartForCausalLM):
        def forward(self, input_ids: Any = None, **named: Any) -> Any:
            found = super().forward(input_ids, **named)
            if bool((input_ids == 3).any()):
                found.logits = found.logits * torch.nan
                found.loss = None if found.loss is None else found.loss * torch.nan
            return found

    rows = rows_of()
    shortest = min(rows, key=lambda row: row["input_ids"].shape[1])
    shortest["input_ids"][:, 0] = 3
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        found = collected(made(lambda: Poisoned(unshifted().config)), rows, on_nonfinite="skip")
    assert caplog.text.count(SAID) == 1
    assert found.metadata["skipped_sequences"] == 1
