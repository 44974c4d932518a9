"""Auto with reference weights: what quantization took, given back, then the task's step, as measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.adapters.origin import origin_of
from lorainit.adapters.targets import match_targets
from lorainit.data.sampling import draw_sample
from lorainit.errors import AdapterError
from lorainit.pipeline.measurements import Measurements
from lorainit.types import GivesBack, LayerStatistics
from tests.adapters.tiny import (
    assert_same_bits,
    base_weights,
    config,
    llama,
    logits,
    start,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def batches(shift: int = 0, count: int = 5, above: int = 0) -> list[dict[str, Tensor]]:
    """Rows of random tokens to know by heart; labels `above` a number are the tokens so many further."""
    found = []
    for seed in range(count):
        ids = torch.randint(1, 62, (8, 6), generator=torch.Generator().manual_seed(seed))
        labels = torch.where(ids > above, (ids - 1 + shift) % 61 + 1, ids)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


@pytest.fixture(scope="module")
def fitted() -> Any:
    """A model that knows the rows by heart."""
    model, data = llama().train(), batches()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(150):
        optimizer.zero_grad()
        model(**data[step % 5]).loss.backward()
        optimizer.step()
    return model.eval()


def quantized(full: nn.Module, levels: int = 1) -> Any:
    model = copy.deepcopy(full)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "proj" in name:
                groups = module.weight.reshape(-1, 16)
                step = groups.abs().amax(-1, keepdim=True) / levels
                module.weight.copy_(((groups / step).round() * step).reshape(module.weight.shape))
    return model


def loss(model: nn.Module, shift: int) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches(shift)) / 5


def measured(model: Any) -> dict[str, float]:
    origin = origin_of(model, "default")
    assert origin is not None
    return dict(origin.measured)


def deltas(model: Any) -> dict[str, Tensor]:
    names = match_targets(model, config()).layers
    base = model.get_base_model()
    return {n: base.get_submodule(n).get_delta_weight("default").detach() for n in names}


def test_on_the_task_that_the_model_knows_it_is_what_was_given_back_alone(fitted: Any) -> None:
    """The closed form at one of the parts: in every layer the same part, of the same method."""
    base = quantized(fitted)
    before = base_weights(base)
    data = batches()
    found = start(base, lorainit.Auto(), data=data, reference_weights=fitted)
    assert_same_bits(base_weights(found), before)
    assert loss(found, 0) < 0.7 * loss(quantized(fitted), 0)
    assert loss(quantized(fitted), 0) > 3 * loss(fitted, 0)
    figures = measured(found)
    assert figures["start_loss"] < figures["base_loss"]
    # Of the same sequences the statistics are, of which a fifth is held back.
    sample = lorainit.collect_statistics(
        quantized(fitted), config(), data=kept(data), needs=lorainit.Auto().needs, progress=False
    )
    moved = deltas(found)
    ways = []
    for method in (lorainit.KroneckerQER(), lorainit.QERA()):
        wanted = start(
            quantized(fitted), method, data=None, statistics=sample, reference_weights=fitted
        )
        errors = [
            float((moved[n] - figures["length"] * d).norm() / d.norm())
            for n, d in deltas(wanted).items()
        ]
        ways.append(max(errors))
    assert min(ways) < 1e-3 < max(ways)


def kept(data: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The sequences that `get_peft_model` takes the statistics of."""
    sample = draw_sample(data, 256, None)
    return [batch.content for batch in sample.held_back(0.2, 0)[0].batches]


def test_the_closed_forms_are_those_of_the_methods(fitted: Any) -> None:
    base = quantized(fitted)
    auto = lorainit.Auto()
    statistics = lorainit.collect_statistics(
        base, config(), data=batches(), needs=auto.needs, progress=False
    )
    name = "model.layers.1.mlp.up_proj"
    weight = base.get_submodule(name).weight.detach()
    layer = statistics[name]
    layer = LayerStatistics(
        **{f: getattr(layer, f) for f in (*layer.TENSORS, *layer.COUNTS)},
        weight_error=fitted.get_submodule(name).weight.detach() - weight,
    )
    assert isinstance(auto, GivesBack)
    steps = auto.compensations(layer, 4)
    for step, method in zip(steps, (lorainit.KroneckerQER(), lorainit.QERA()), strict=True):
        wanted = method.solve(weight, layer, 4, 2.0)
        torch.testing.assert_close(
            step.left @ step.right, 2 * wanted.B @ wanted.A, rtol=1e-4, atol=1e-6
        )


def test_another_task_gets_its_step_from_statistics_where_it_begins(
    fitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of the labels three further: a step in the same rank, its statistics taken where it begins."""
    at: list[int] = []
    collect = Measurements.statistics

    def watched(self: Any, sample: Any, where: Any = None, planned: Any = None) -> Any:
        at.append(0 if where is None else sum(bool(term.left.any()) for term in where.values()))
        return collect(self, sample, where, planned)

    monkeypatch.setattr(Measurements, "statistics", watched)
    method = lorainit.Auto(least_gain=0.01)
    data = batches(3, above=45)
    found = start(quantized(fitted), method, data=data, reference_weights=fitted)
    assert at == [0, 14]
    figures = measured(found)
    assert figures["start_loss"] < 0.95 * figures["base_loss"]
    for delta in deltas(found).values():
        values = torch.linalg.svdvals(delta)
        assert int((values > 1e-5 * values[0]).sum()) <= 4
    # What was given back is in it: the start lies along the error, as no step of the task does.
    alone = start(quantized(fitted), lorainit.Natural(), data=data)
    assert along_error(found, fitted) > 0.2 > 0.1 > along_error(alone, fitted)
    assert figures["start_loss"] < measured(alone)["start_loss"]


def along_error(model: Any, full: Any) -> float:
    """The mean cosine between the start and what quantization took."""
    cosines = []
    for name, delta in deltas(model).items():
        weight = model.get_base_model().get_submodule(name).base_layer.weight
        error = (full.get_submodule(name).weight - weight).detach()
        cosines.append(float((delta * error).sum() / delta.norm() / error.norm()))
    return sum(cosines) / len(cosines)


def test_what_does_not_lower_the_loss_is_not_given_back(fitted: Any) -> None:
    """A reference that is worse than the base: Auto is what it is without one, to the bit."""
    noise = torch.Generator().manual_seed(0)
    worse = copy.deepcopy(fitted)
    with torch.no_grad():
        for name, parameter in worse.named_parameters():
            if "proj" in name:
                drawn = torch.randn(parameter.shape, generator=noise)
                parameter.add_(drawn * 0.7 * parameter.norm() / drawn.norm())
    torch.manual_seed(0)
    found = start(copy.deepcopy(fitted), lorainit.Auto(), data=batches(), reference_weights=worse)
    torch.manual_seed(0)
    wanted = start(copy.deepcopy(fitted), lorainit.Auto(), data=batches())
    assert torch.equal(logits(found), logits(wanted))
    assert measured(found) == measured(wanted)


@pytest.mark.parametrize(("levels", "gives"), [(1, True), (7, False)])
def test_what_takes_little_of_the_weights_leaves_the_rank_to_the_step(
    fitted: Any, levels: int, gives: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Three values take half of a weight, fifteen less than an eighth: then it is Auto without reference."""
    base = quantized(fitted, levels)
    names = match_targets(base, config()).layers
    taken = [
        float((fitted.get_submodule(n).weight - base.get_submodule(n).weight).norm())
        / float(fitted.get_submodule(n).weight.norm())
        for n in names
    ]
    assert (sorted(taken)[len(taken) // 2] > lorainit.Auto().least_taken) == gives
    caplog.set_level("INFO", logger="lorainit")
    starts = []
    for reference in (fitted, None):
        torch.manual_seed(0)
        found = start(
            quantized(fitted, levels), lorainit.Auto(), data=batches(), reference_weights=reference
        )
        starts.append(logits(found))
    assert torch.equal(*starts) == (not gives)
    assert ("less than least_taken=0.125" in caplog.text) == (not gives)
    always = lorainit.Auto(least_taken=0.0)
    given = start(quantized(fitted, levels), always, data=batches(), reference_weights=fitted)
    assert not torch.equal(logits(given), starts[1])


def test_without_a_reference_nothing_changes(fitted: Any) -> None:
    """Auto's own start is Natural's, as before."""
    found, wanted = (
        start(quantized(fitted), method, data=batches(3))
        for method in (lorainit.Auto(least_gain=0.0), lorainit.Natural())
    )
    assert torch.equal(logits(found), logits(wanted))


def test_what_cannot_be_measured_is_refused(fitted: Any) -> None:
    base = quantized(fitted)
    statistics = lorainit.collect_statistics(
        base, config(), data=batches(), needs=lorainit.Auto().needs, progress=False
    )
    with pytest.raises(AdapterError, match="pass data="):
        start(base, lorainit.Auto(), data=None, statistics=statistics, reference_weights=fitted)
    with pytest.raises(AdapterError, match="leave its length at None"):
        start(base, lorainit.Auto(least_gain=0.0, length=1.0), reference_weights=fitted)
