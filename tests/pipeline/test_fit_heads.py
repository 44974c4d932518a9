"""Heads fitted alone: against a dense Newton optimum of the same objective, on features taken by a hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorainit.calibration.fit_heads import HeadFit, fit_heads
from lorainit.calibration.head_loss import HeadLoss
from lorainit.data.batch import Batch
from lorainit.models.heads import CannotRunAlone
from lorainit.models.state import measuring
from lorainit.statistics.loss.own_loss import OwnLoss
from tests.measuring import subject
from tests.pipeline.classifiers import classifier, labelled
from tests.untouched import untouched

DECAY = 0.1


def smoothed(model: Any, batch: Any) -> Tensor:
    """A loss of the user's own: labels smoothed, classes weighed."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=logits.dtype)
    return F.cross_entropy(logits, batch["labels"], weight, reduction="none", label_smoothing=0.2)


def head_of(model: Any, kind: str) -> tuple[str, Any]:
    name = "qa_outputs" if kind == "spans" else "classifier"
    return name, model.get_submodule(name)


def fitted(model: Any, kind: str, data: Any, **options: Any) -> tuple[HeadFit | None, Any]:
    name, head = head_of(model, kind)
    batches = [Batch.arrived(b, i) for i, b in enumerate(data)]
    found = fit_heads(
        subject(model, {}, **options),
        {name: head},
        {name: (head.weight.detach(), head.bias.detach())},
        batches,
        batches,
        decays=(DECAY,),
        tolerance=1e-8,
    )
    return found, None if found is None else found.values[name]


def features_of(model: Any, head: Any, data: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
    handle.remove()
    return seen


def mean_loss(kind: str, logits: list[Tensor], data: Any) -> Tensor:
    """Written out once more: the mean over sequences of each one's mean over its labels."""
    losses = []
    for z, batch in zip(logits, data, strict=True):
        if kind == "tags":
            y = batch["labels"]
            each = F.cross_entropy(z.mT, y, ignore_index=-100, reduction="none")
            losses += list(each.sum(1) / (y != -100).sum(1))
        elif kind == "spans":
            start, end = (F.cross_entropy(z[..., i], batch[k], reduction="none") for i, k in enumerate(
                ("start_positions", "end_positions")))  # fmt: skip
            losses += list((start + end) / 2)
        elif kind == "labels":
            losses += list(
                F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none").mean(1)
            )
        elif kind == "numbers":
            losses += list((z[:, 0] - batch["labels"]).square())
        elif kind == "smoothed":
            weight = torch.tensor([1.0, 2.0, 0.5], dtype=z.dtype)
            losses += list(
                F.cross_entropy(z, batch["labels"], weight, reduction="none", label_smoothing=0.2)
            )
        else:
            losses += list(F.cross_entropy(z, batch["labels"], reduction="none"))
    return torch.stack(losses).mean()


def objective(kind: str, features: list[Tensor], data: Any, head: Any) -> Any:
    counted = features
    if kind == "tags":
        counted = [x[b["labels"] != -100] for x, b in zip(features, data, strict=True)]
    flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in counted])
    strength = DECAY * (flat - flat.mean(0)).square().mean(0).sum() / flat.shape[1]
    rows, columns = head.weight.shape

    def value(flat_weights: Tensor) -> Tensor:
        weight = flat_weights[: rows * columns].view(rows, columns)
        bias = flat_weights[rows * columns :]
        logits = [x @ weight.mT + bias for x in features]
        moved = weight - head.weight.detach()
        return mean_loss(kind, logits, data) + strength / 2 * moved.square().sum()

    return value


KINDS = ["classes", "labels", "numbers", "tags", "spans", "smoothed"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_newton_optimum_of_the_models_own_loss(kind: str) -> None:
    model_kind = "classes" if kind == "smoothed" else kind
    # Fewer sequences than features, and more.
    for count in (12,) if kind == "spans" else (12, 40):
        size = 1 if kind == "spans" else 20
        data = labelled(model_kind, count, size)
        model = classifier(model_kind)
        options: dict[str, Any] = {"smoothed": {"loss_fn": smoothed}}.get(kind, {})
        if kind == "spans":
            options = {"loss_fn": OwnLoss("sequence")}
        _, head = head_of(model, model_kind)
        with untouched(model):
            _, (weight, bias) = fitted(model, model_kind, data, **options)
        value = objective(kind, features_of(model, head, data), data, head)
        here = torch.cat([weight.flatten(), bias])
        start = torch.cat([head.weight.detach().flatten(), head.bias.detach()])
        gradient = torch.func.grad(value)(here)
        at_start = torch.func.grad(value)(start)
        assert float(gradient.norm()) < 1e-6 * float(at_start.norm()) < float(at_start.norm())
        newton = start
        for _ in range(7):
            slope = torch.func.grad(value)(newton)
            # A common shift of a span's logits changes nothing.
            inverse = torch.linalg.pinv(
                torch.func.hessian(value)(newton), rtol=1e-10, hermitian=True
            )
            newton = newton - inverse @ slope
        assert float(value(newton)) <= float(value(here)) + 1e-12
        logits = [x @ weight.mT + bias for x in features_of(model, head, data)]
        n = weight.numel()
        for z, x in zip(logits, features_of(model, head, data), strict=True):
            other = x @ newton[:n].view_as(weight).mT + newton[n:]
            # Of spans the level is nobody's.
            level = [y.mean(-2, keepdim=True) if kind == "spans" else 0.0 for y in (z, other)]
            assert torch.allclose(z - level[0], other - level[1], atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_part_of_the_way_keeps_the_mean_output_of_the_minimum(bias: bool) -> None:
    data = labelled("classes")
    model = classifier()
    if not bias:
        model.classifier.bias = None
    head = model.classifier
    present = head.weight.detach(), None if head.bias is None else head.bias.detach()
    batches = [Batch.arrived(b, i) for i, b in enumerate(data)]
    found = {
        part: fit_heads(
            subject(model, {}),
            {"classifier": head},
            {"classifier": present},
            batches,
            batches,
            part=part,
            decays=(DECAY,),
            tolerance=1e-8,
        )
        for part in (0.0, 0.25, 1.0)
    }
    x = torch.cat(features_of(model, head, data))
    outputs = {}
    for part, fit in found.items():
        assert fit is not None
        weight, offset = fit.values["classifier"]
        whole = found[1.0].values["classifier"][0]  # type: ignore[union-attr]
        expected = present[0] + part * (whole - present[0])
        assert torch.allclose(weight, expected, atol=1e-12)
        logits = x @ weight.mT + (0.0 if offset is None else offset)
        outputs[part] = logits.mean(0)
        loss = F.cross_entropy(logits, torch.cat([b["labels"] for b in data]))
        assert float(loss) == pytest.approx(fit.after, rel=1e-6)
        assert fit.gain.mean == pytest.approx(fit.before - found[1.0].after, rel=1e-6)  # type: ignore[union-attr]
    if bias:
        assert torch.allclose(outputs[0.0], outputs[1.0], atol=1e-9)
        assert torch.allclose(outputs[0.25], outputs[1.0], atol=1e-9)


def test_numbers_are_a_ridge_regression() -> None:
    """In closed form: the same normal equations, centred, toward the present weights."""
    data = labelled("numbers")
    model = classifier("numbers")
    _, (weight, _) = fitted(model, "numbers", data)
    x = torch.cat(features_of(model, model.classifier, data))
    y = torch.cat([b["labels"] for b in data])
    w0 = model.classifier.weight.detach()[0]
    x, y = x - x.mean(0), y - y.mean()
    # The mean of squares has twice the curvature that the decay's half square has.
    strength = DECAY * x.square().mean(0).sum() / x.shape[1] / 2
    normal = x.mT @ x / len(x) + strength * torch.eye(x.shape[1], dtype=x.dtype)
    closed = torch.linalg.solve(normal, x.mT @ y / len(x) + strength * w0)
    assert torch.allclose(weight[0], closed, atol=1e-8)
    assert not torch.allclose(weight[0], w0, atol=1e-2)


def test_what_the_logits_are_made_of_decides_what_is_fitted() -> None:
    """A layer before the head has no gradient of its own once the head's output is given."""
    model = classifier()
    heads = {"classifier": model.classifier, "pooler": model.bert.pooler.dense}
    batches = [Batch.arrived(b, i) for i, b in enumerate(labelled("classes"))]
    with measuring(model):
        loss = HeadLoss(subject(model, {}), heads, batches)
    assert len(torch.cat(loss.features("classifier"))) == 60
    assert len(torch.cat(loss.features("pooler"))) == 0


def test_only_the_positions_that_the_loss_reads_are_kept() -> None:
    data = labelled("tags")
    model = classifier("tags")
    batches = [Batch.arrived(b, i) for i, b in enumerate(data)]
    with measuring(model):
        loss = HeadLoss(subject(model, {}), {"classifier": model.classifier}, batches)
    counted = sum(int((b["labels"] != -100).sum()) for b in data)
    assert len(torch.cat(loss.features("classifier"))) == counted < 60 * 7


def leaning(model: Any, batch: Any) -> Tensor:
    """A loss that reads what comes before the head, too."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    own = F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")
    return own + model.bert(**inputs).last_hidden_state.abs().mean((1, 2))


def test_a_loss_that_is_not_the_heads_alone_is_left() -> None:
    model = classifier()
    with untouched(model):
        assert fitted(model, "classes", labelled("classes"), loss_fn=leaning)[0] is None


def broken(model: Any, batch: Any) -> Tensor:
    raise ValueError("no loss today")


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = classifier()
    with untouched(model), pytest.raises(ValueError, match="today"):
        fitted(model, "classes", labelled("classes"), loss_fn=broken)


def test_a_head_that_runs_twice_is_left() -> None:
    model = classifier()

    def twice(model: Any, batch: Any) -> Tensor:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        first, second = model(**inputs).logits, model(**inputs).logits
        return F.cross_entropy(first + second, batch["labels"], reduction="none")

    batches = [Batch.arrived(b, i) for i, b in enumerate(labelled("classes"))]
    with untouched(model), measuring(model), pytest.raises(CannotRunAlone, match="several times"):
        HeadLoss(subject(model, {}, loss_fn=twice), {"classifier": model.classifier}, batches)
