"""Architectures of which each is another kind: gradient of the model's own loss, moments of its own rows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import Tensor, nn

import lorainit
from tests.statistics.kinds import KINDS, Row, made, together
from tests.statistics.models import all_linear

pytestmark = pytest.mark.filterwarnings("ignore")

NEEDS = {"gradient", "input_second_moment", "input_mean", "output_second_moment"}


def collected(model: nn.Module, data: list[Row], **settings: Any) -> Any:
    settings = {"needs": NEEDS, "on_unused": "default", "progress": False} | settings
    return lorainit.collect_statistics(
        model, all_linear(), data=[dict(batch) for batch in data], **settings
    )


def truth(
    model: nn.Module, rows: list[Row], pads_to: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """By module, sums over single rows: autograd of the model's own loss, and plain hooks' moments.

    What the model pads at the end, to so many positions, is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    handles = []
    length = 0

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: Any, output: Tensor) -> None:
            x = (args or tuple(kwargs.values()))[0].detach().flatten(0, -2).double()
            kept = slice(length) if len(x) == pads_to else slice(None)
            x = x[kept]

            def slope(g: Tensor) -> None:
                g = g.flatten(0, -2).double()[kept]
                sums = found.setdefault(name, {"positions": 0, "Sx": 0, "Sy": 0})
                sums["positions"] += len(x)
                sums["Sx"] = sums["Sx"] + x.mT @ x
                sums["Sy"] = sums["Sy"] + g.mT @ g

            if output.requires_grad:
                output.register_hook(slope)

        return keep

    model.requires_grad_(True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    for row in rows:
        length = next(iter(row.values())).shape[1]
        model(**row).loss.backward()
    for handle in handles:
        handle.remove()
    for name, sums in found.items():
        gradient = model.get_submodule(name).weight.grad
        if gradient is not None:
            sums["G"] = gradient.detach().clone()
    model.zero_grad(set_to_none=True)
    return found


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.double().norm().clamp_min(1e-9))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The gradient is that of the model's own loss; moments do not depend on how rows are batched."""
    kind = KINDS[name]
    model, rows = made(kind.build), kind.rows()
    expected = truth(model, rows, kind.pads_to)
    with caplog.at_level(logging.WARNING, logger="lorainit"):
        alone = collected(model, rows)
        batched = collected(model, [together(rows[:3]), together(rows[3:])])
    assert ("the default loss is not that of" in caplog.text) == kind.own
    assert ("do not lie like" in caplog.text) == kind.warns
    layers = [n for n in alone.names if n in expected]
    assert len(layers) >= 2
    largest = max(float(expected[n]["G"].norm()) for n in layers)
    for statistics in (alone, batched) if kind.batched else (alone,):
        for layer in layers:
            own, sums = statistics[layer], expected[layer]
            assert own.positions == sums["positions"], layer
            assert far(own.input_second_moment_sum, sums["Sx"]) < 1e-3, layer
            if float(sums["G"].norm()) > 1e-5 * largest:
                assert far(own.gradient_sum, sums["G"]) < 1e-3, layer
                assert far(own.output_second_moment_sum, sums["Sy"]) < 1e-3, layer
