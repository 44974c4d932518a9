"""Steps of layers that share an input are those of each by itself, and its moment is factored once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorainit
from lorainit.adapters.targets import Target
from lorainit.calibration.step_stack import Pairs, StepStack
from lorainit.methods import metric
from lorainit.statistics import Statistics
from lorainit.types import LayerSpec, LayerStatistics

RANK, OUT, INNER = 3, 8, 12
NAMES = [f"{block}.{name}" for block in "01" for name in "qkv"]
TARGETS = [
    Target(LayerSpec(name, OUT, INNER, RANK, 1.0), nn.Linear(INNER, OUT).double()) for name in NAMES
]
LIMITS = dict.fromkeys(NAMES, 0.5)
METHOD = lorainit.Natural()


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def statistics(*, shared: bool) -> Statistics:
    """Two blocks of three layers that read one input; not `shared`: each with its own copy of its moment."""
    layers: dict[str, Any] = {}
    for place, block in enumerate("01"):
        x = draw(place, 40, INNER)
        moment = x.mT @ x
        for seed, name in enumerate("qkv"):
            g = draw(10 + 3 * place + seed, 40, OUT)
            layers[f"{block}.{name}"] = LayerStatistics(
                gradient_sum=g.mT @ x,
                input_second_moment_sum=moment if shared else moment.clone(),
                output_second_moment_sum=g.mT @ g,
                sequences=40,
                label_tokens=40,
                positions=40,
            )
    return Statistics(layers, {})


def measured(found: Statistics, present: Pairs) -> StepStack:
    return StepStack.all_measured(METHOD, TARGETS, found, present, LIMITS)[0]


@pytest.mark.parametrize("later", [False, True])
def test_steps_are_those_of_each_layer(later: bool) -> None:
    present = {
        name: (draw(50 + i, OUT, RANK), draw(60 + i, RANK, INNER)) for i, name in enumerate(NAMES)
    }
    place = present if later else {}
    shared, apart = (measured(statistics(shared=kind), place) for kind in (True, False))
    for length in (0.1, 1.0):
        for one, other in zip(shared.moved(length, 2), apart.moved(length, 2), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    # The control: of a moment that is not the layer's own there is another step.
    mixed = statistics(shared=True)
    wrong = replace(mixed["0.k"], input_second_moment_sum=mixed["1.k"].input_second_moment_sum)
    layers = {name: mixed[name] for name in NAMES} | {"0.k": wrong}
    found = measured(Statistics(layers, {}), place).moved(0.1, 2)
    assert not torch.allclose(found[0][1], apart.moved(0.1, 2)[0][1], rtol=1e-3)


def test_a_shared_moment_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    factored: list[int] = []
    work = metric.linalg.damped_root

    def spy(second: Tensor, damping: float, mode: Any, what: str) -> Tensor:
        if what.startswith("the input"):
            once = second[:, 0] if second.dim() == 4 and second.stride(1) == 0 else second
            factored.append(once[..., 0, 0].numel())
        return work(second, damping, mode, what)

    monkeypatch.setattr(metric.linalg, "damped_root", spy)
    measured(statistics(shared=True), {})
    measured(statistics(shared=False), {})
    assert factored == [2, 6]
