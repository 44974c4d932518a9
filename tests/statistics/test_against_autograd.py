"""Every statistic of every layer, against autograd and dense sums, in float64 to 1e-10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.statistics.positions.counted import attends_to_itself
from lorainit.types import STATISTICS, Diagonal
from tests.statistics import models, reference
from tests.statistics.models import Batch, all_linear, batches, sequences
from tests.statistics.reference import Counted, Losses, Truth

F64 = torch.float64
TOLERANCE = 1e-10


def collect(model: nn.Module, data: Sequence[Batch], **settings: Any) -> lorainit.Statistics:
    settings.setdefault("needs", STATISTICS)
    config = settings.pop("config", None) or all_linear()
    return lorainit.collect_statistics(model, config, data=data, progress=False, **settings)


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max())
    assert scale > 0, f"{what}: the expected statistic is zero, which checks nothing"
    assert float((found - expected).abs().max()) <= TOLERANCE * scale, what


def assert_true(found: Mapping[str, Any], truth: Mapping[str, Truth]) -> None:
    assert set(found) == set(truth)
    for name, true in truth.items():
        layer = found[name]
        assert_close(layer.gradient, true.G, f"{name}: G")
        moment = layer.input_second_moment
        if isinstance(moment, Diagonal):
            moment = moment.dense()
        assert_close(moment, true.Sx, f"{name}: Sx")
        assert_close(layer.input_mean, true.mean, f"{name}: mean")
        assert_close(layer.output_second_moment, true.Sy, f"{name}: Sy")
        assert_close(layer.output_second_moment_diagonal, true.Sy.diagonal(), f"{name}: diagonal")
        assert layer.positions == true.positions
        assert layer.sequences == true.sequences


def check(
    model: nn.Module,
    data: Sequence[Batch],
    losses: Losses,
    counted: Counted = reference.attention,
    **settings: Any,
) -> lorainit.Statistics:
    found = collect(model, data, **settings)
    assert_true(found, reference.reference(model, list(found), data, losses, counted))
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_llama(size: int) -> None:
    found = check(models.llama(F64), batches(sequences(), size), reference.causal)
    assert len(found) == 14


def test_llama_with_rows_that_have_no_labels() -> None:
    """They are no part of any sum: the same as without them, and not as with them."""
    rows = sequences()
    rows[2]["labels"][:] = -100
    model = models.llama(F64)
    found = collect(model, batches(rows, 3))
    without = collect(model, batches(rows[:2] + rows[3:], 3))
    inputs = lorainit.collect_statistics(
        model, all_linear(), data=batches(rows, 3), needs=["input_second_moment"], progress=False
    )
    for name, layer in found.items():
        assert layer.sequences == len(rows) - 1
        for field in ("gradient_sum", "input_second_moment_sum", "output_second_moment_sum"):
            assert_close(getattr(layer, field), getattr(without[name], field), f"{name}: {field}")
        assert layer.positions == without[name].positions < inputs[name].positions


def test_llama_counting_label_positions() -> None:
    def predicts(name: str, batch: Mapping[str, Tensor]) -> Tensor:
        del name
        mask = torch.zeros_like(batch["labels"], dtype=torch.bool)
        mask[:, :-1] = batch["labels"][:, 1:] != -100
        return mask

    model, data = models.llama(F64), batches(sequences(), 3)
    check(model, data, reference.causal, predicts, token_mask="labels")


def test_llama_weighing_tokens() -> None:
    model, data = models.llama(F64), batches(sequences(), 3)
    found = collect(model, data, loss_reduction="token")
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)

    def totals(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor | None]:
        return reference.causal(model, batch, total=True)

    truth = reference.reference(model, list(found), data, totals, gradient_count=tokens)
    assert_true(found, truth)
    by_sequence = collect(model, data)
    name = next(iter(found))
    assert not torch.allclose(found[name].gradient, by_sequence[name].gradient, rtol=1e-2)


def test_gpt2_whose_weights_are_transposed() -> None:
    check(models.gpt2(F64), batches(sequences(), 3), reference.causal)


def test_bert_sequence_classification() -> None:
    model = models.bert(F64, "SequenceClassification", num_labels=3)
    check(model, models.classified(sequences(), 3, 3), reference.one_label, per_layer_mask)


def test_bert_token_classification() -> None:
    model = models.bert(F64, "TokenClassification", num_labels=VOCABULARY)
    check(model, batches(sequences(), 3), reference.aligned)


VOCABULARY = models.VOCABULARY


def per_layer_mask(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """A pooler reads one vector a sample: no position of it is padding."""
    return None if "pooler" in name or "classifier" in name else reference.attention(name, batch)


def test_t5_each_side_under_its_own_mask() -> None:
    def sided(name: str, batch: Mapping[str, Tensor]) -> Tensor:
        reads_encoder = name.startswith("encoder") or (
            "EncDecAttention" in name and name.endswith((".k", ".v"))
        )
        return batch["attention_mask"].bool() if reads_encoder else batch["labels"] != -100

    data = models.seq2seq(sequences(), 3)
    found = check(models.t5(F64), data, reference.sequence_to_sequence, sided)
    assert any("EncDecAttention.k" in name for name in found)


def test_t5_sides_of_one_length_are_told_apart() -> None:
    """With as many target as source positions the two masks have one shape, and still differ."""
    rows = sequences(3)
    data = models.seq2seq(rows, 3)
    for batch in data:
        longer = batch["input_ids"].shape[1] - batch["labels"].shape[1]
        batch["labels"] = nn.functional.pad(batch["labels"], (0, longer), value=-100)

    def sided(name: str, batch: Mapping[str, Tensor]) -> Tensor:
        reads_encoder = name.startswith("encoder") or (
            "EncDecAttention" in name and name.endswith((".k", ".v"))
        )
        return batch["attention_mask"].bool() if reads_encoder else batch["labels"] != -100

    check(models.t5(F64), data, reference.sequence_to_sequence, sided)


def test_vit() -> None:
    images = torch.randn(5, 1, 8, 8, dtype=F64)
    data = [
        {"pixel_values": images[:2], "labels": torch.tensor([0, 1])},
        {"pixel_values": images[2:], "labels": torch.tensor([2, 1, 0])},
    ]
    check(models.vit(F64), data, reference.one_label)


def reads_whispers_encoder(name: str) -> bool:
    return ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))


def speech(lengths: list[int] | None, size: int = 20) -> list[Any]:
    labels = torch.randint(3, VOCABULARY, (4, 6))
    labels[1, 4:] = labels[3, 2:] = -100
    batch = {"input_features": torch.randn(4, 8, 20, dtype=F64), "labels": labels}
    if lengths is not None:
        mask = torch.arange(size) < torch.tensor(lengths)[:, None]
        batch["attention_mask"] = mask.long()
    return [batch]


@pytest.mark.parametrize("lengths", [None, [20, 13, 8, 5]], ids=["whole", "padded"])
def test_whisper(lengths: list[int] | None) -> None:
    """Two frames make one step of the encoder, whose mask is of the frames."""

    def sided(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        if not reads_whispers_encoder(name):
            return batch["labels"] != -100
        if lengths is None:
            return None
        return torch.arange(10) < torch.tensor([-(-n // 2) for n in lengths])[:, None]

    check(models.whisper(F64), speech(lengths), reference.sequence_to_sequence, sided)


def test_wav2vec2() -> None:
    """Convolutions of strides 3 and 2 make frames of samples."""
    samples = torch.tensor([64, 40, 25])
    mask = torch.arange(64) < samples[:, None]
    values = torch.randn(3, 64, dtype=F64) * mask
    data = [
        {"input_values": values, "attention_mask": mask.long(), "labels": torch.tensor([0, 2, 1])}
    ]
    frames = ((samples - 4) // 3 + 1 - 2) // 2 + 1
    assert frames.tolist() == [10, 6, 4]

    def counted(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        return None if name == "classifier" else torch.arange(10) < frames[:, None]

    found = check(models.wav2vec2(F64), data, reference.one_label, counted)
    assert any("projector" in name for name in found)


def test_masks_that_nothing_explains_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A mask of another number of frames, or with a hole: all positions count, in one line."""

    def sided(name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
        return None if reads_whispers_encoder(name) else batch["labels"] != -100

    hole = speech([20, 13, 8, 5])
    hole[0]["attention_mask"][1, 3] = 0
    for data in (speech([30, 13, 8, 5], size=30), hole):
        caplog.clear()
        with caplog.at_level("WARNING", logger="lorainit"):
            check(models.whisper(F64), data, reference.sequence_to_sequence, sided)
        assert caplog.text.count("do not lie like the attention mask") == 1
        assert "batches without padding" in caplog.text
        assert "encoder" in caplog.text


@pytest.mark.parametrize("kind", ["added", "boolean", "three axes"])
def test_masks_of_who_attends_to_whom(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """As long as the plain mask of the same rows, they give the same statistics."""
    plain = [models.pad(sequences(), extra=4)]
    mask = plain[0]["attention_mask"].bool()
    attends = mask[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    added = torch.zeros(attends.shape, dtype=F64).masked_fill(~attends, torch.finfo(F64).min)
    whole = {"added": added, "boolean": attends, "three axes": attends[:, 0]}[kind]
    if kind == "three axes":
        assert torch.equal(attends_to_itself(whole), mask)
        return
    with caplog.at_level("WARNING", logger="lorainit"):
        found = collect(models.llama(F64), [plain[0] | {"attention_mask": whole}])
        expected = collect(models.llama(F64), plain)
    assert not caplog.text
    for name, layer in expected.items():
        assert found[name].positions == layer.positions < mask.numel()
        for field in ("gradient", "input_second_moment", "output_second_moment"):
            torch.testing.assert_close(getattr(found[name], field), getattr(layer, field))


@pytest.mark.parametrize("as_dict", [False, True], ids=["tensor", "dictionary"])
def test_perceptron_by_the_default_loss(as_dict: bool) -> None:
    model = models.Perceptron(as_dict=as_dict).to(F64)
    data = [{"x": torch.randn(n, 5, dtype=F64), "labels": torch.arange(n) % 3} for n in (4, 1, 3)]
    config = perceptron_config()
    check(model, data, reference.one_label, config=config)


def perceptron_config(depth: int = 2) -> Any:
    return models.LoraConfig(r=2, target_modules=[f"layers.{i}" for i in range(depth)])


def squared_error(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    errors = model(x=batch["x"]) - batch["y"]
    return 0.5 * errors.square().sum(-1)


def test_perceptron_by_a_loss_of_its_own() -> None:
    model = models.Perceptron().to(F64)
    data = [
        {"x": torch.randn(n, 5, dtype=F64), "y": torch.randn(n, 3, dtype=F64)} for n in (4, 1, 3)
    ]
    check(model, data, reference.squared, config=perceptron_config(), loss_fn=squared_error)


def test_a_loss_of_its_own_serves_statistics_that_need_no_gradient() -> None:
    """Only the loss function knows how to call such a model."""
    model = models.Perceptron().to(F64)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return squared_error(model, {"x": batch["features"], "y": batch["targets"]})

    x, y = torch.randn(6, 5, dtype=F64), torch.randn(6, 3, dtype=F64)
    found = collect(
        model,
        [{"features": x, "targets": y}],
        config=perceptron_config(),
        needs={"input_second_moment"},
        loss_fn=loss,
    )
    assert_close(found["layers.0"].input_second_moment, x.mT @ x / 6, "Sx")


@pytest.mark.parametrize("needs", [{"input_second_moment"}, {"input_mean"}])
def test_input_statistics_alone_are_the_same(needs: set[str]) -> None:
    model, data = models.llama(F64), batches(sequences(), 3)
    alone, whole = collect(model, data, needs=needs), collect(model, data)
    for name, layer in whole.items():
        for need in needs:
            assert_close(getattr(alone[name], need), getattr(layer, need), f"{name}: {need}")


def test_input_statistics_of_a_sequence_to_sequence_model_alone() -> None:
    model, data = models.t5(F64), models.seq2seq(sequences(), 3)
    alone, whole = collect(model, data, needs={"input_second_moment"}), collect(model, data)
    assert set(alone) == set(whole)
    for name, layer in whole.items():
        assert_close(alone[name].input_second_moment, layer.input_second_moment, name)


# --- where the Kronecker product is exact -------------------------------------------------------


def factorial(model: nn.Module) -> Batch:
    """Every input together with every residual: residuals independent of inputs by construction."""
    x = torch.randn(6, 5, dtype=F64)
    residuals = torch.randn(4, 3, dtype=F64)
    inputs = x.repeat_interleave(len(residuals), 0)
    with torch.no_grad():
        outputs = model(x=inputs)
    return {"x": inputs, "y": outputs - residuals.repeat(len(x), 1)}


def dense_fisher(model: nn.Module, weights: Sequence[Tensor], data: Batch) -> Tensor:
    """Mean over samples of ``vec(dl/dW) vec(dl/dW)^T``, every layer's columns first."""
    rows = []
    for loss in reference.squared(model, data):
        gradients = torch.autograd.grad(loss, list(weights), retain_graph=True)
        rows.append(torch.cat([g.mT.reshape(-1) for g in gradients]))
    stacked = torch.stack(rows)
    return stacked.mT @ stacked / len(stacked)


def kronecker(layer: Any) -> Tensor:
    return torch.kron(
        layer.input_second_moment.contiguous(), layer.output_second_moment.contiguous()
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_factors_are_the_dense_fisher_where_residuals_are_independent(depth: int) -> None:
    model = linear_network(depth)
    data = factorial(model)
    names = [f"layers.{i}" for i in range(depth)]
    found = collect(model, [data], config=perceptron_config(depth), loss_fn=squared_error)
    for name in names:
        fisher = dense_fisher(model, [model.get_submodule(name).weight], data)
        error = (kronecker(found[name]) - fisher).norm() / fisher.norm()
        assert float(error) <= 1e-8


def test_factors_are_not_the_dense_fisher_where_residuals_depend_on_inputs() -> None:
    model = linear_network(2)
    x = torch.randn(24, 5, dtype=F64)
    # Large inputs have large residuals, so E[x x^T g g^T] is more than its product.
    data = {"x": x, "y": x.square().sum(-1, keepdim=True) * torch.randn(24, 3, dtype=F64)}
    found = collect(model, [data], config=perceptron_config(), loss_fn=squared_error)
    for name in found:
        fisher = dense_fisher(model, [model.get_submodule(name).weight], data)
        error = (kronecker(found[name]) - fisher).norm() / fisher.norm()
        assert float(error) > 0.1


def linear_network(depth: int) -> nn.Module:
    class Linear(models.Perceptron):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return Linear(bias=False, depth=depth).to(F64)
