"""Auto with reference weights: what quantization took is given back, unless it is little or does not pay."""

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


def test_it_is_kronecker_qer_of_the_sequences_that_are_not_held_back(fitted: Any) -> None:
    base = quantized(fitted)
    before = base_weights(base)
    data = batches()
    found = start(base, lorainit.Auto(), data=data, reference_weights=fitted)
    assert_same_bits(base_weights(found), before)
    assert loss(found, 0) < 0.7 * loss(quantized(fitted), 0)
    assert loss(quantized(fitted), 0) > 3 * loss(fitted, 0)
    figures = measured(found)
    assert figures["start_loss"] < figures["base_loss"]
    assert figures["length"] == 1.0
    # Of all but the fifth that the loss is measured on.
    sample = draw_sample(data, 256, None).held_back(0.2, 0)[0]
    statistics = lorainit.collect_statistics(
        quantized(fitted), config(), data=[batch.content for batch in sample.batches],
        needs=lorainit.Auto().needs, progress=False,
    )  # fmt: skip
    errors = []
    for method in (lorainit.KroneckerQER(), lorainit.QERA()):
        wanted = start(
            quantized(fitted), method, data=None, statistics=statistics, reference_weights=fitted
        )
        moved = deltas(found)
        errors.append(
            max(float((moved[n] - d).norm() / d.norm()) for n, d in deltas(wanted).items())
        )
    assert errors[0] < 1e-4 < 0.01 < errors[1]


def test_statistics_that_are_there_are_used(fitted: Any) -> None:
    statistics = lorainit.collect_statistics(
        quantized(fitted), config(), data=batches(), needs=lorainit.Auto().needs, progress=False
    )
    given = {"statistics": statistics, "reference_weights": fitted}
    found = start(quantized(fitted), lorainit.Auto(), data=batches(), **given)
    wanted = start(quantized(fitted), lorainit.KroneckerQER(), data=None, **given)
    torch.testing.assert_close(logits(found), logits(wanted))
    assert measured(found)["base_loss"] == pytest.approx(loss(quantized(fitted), 0), rel=1e-3)
    assert measured(found)["start_loss"] == pytest.approx(loss(found, 0), rel=1e-3)


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
