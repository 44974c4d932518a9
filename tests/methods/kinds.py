"""The methods' optima once more, on layers that are no ``nn.Linear``: a convolution and an embedding.

Statistics are those that the package collects of the layer in a small network; what they are compared with
is the dense truth by autograd over patches and one-hot rows (`tests.statistics.reference`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import lorainit
from lorainit.methods.table import STARTS
from lorainit.types import STATISTICS, LayerStatistics
from tests.methods import common
from tests.methods.common import IN, OUT, Check, relative
from tests.statistics import reference

KERNEL = (2, 1)
ROWS, LENGTH = 24, 16


class _Network(nn.Module):
    """One layer to look at, and a loss that curves."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer: nn.Module
        if kind == "Conv2d":
            self.layer = nn.Conv2d(IN // 2, OUT, KERNEL, stride=(2, 1))
        else:
            self.layer = nn.Embedding(IN, OUT)
        self.last = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        hidden = hidden.flatten(2).mT if self.kind == "Conv2d" else hidden
        position = torch.linspace(0.5, 1.5, hidden.shape[1], dtype=hidden.dtype)[:, None]
        scores: Tensor = self.last((hidden * position).square().mean(1) + hidden.mean(1))
        return scores


@dataclass(frozen=True)
class Layer:
    """A layer with what the package collects of it, and with the truth.

    Attributes:
        weight: ``(out, in)``.
        collected: by the package.
        dense: by autograd and sums over patches or one-hot rows.
    """

    weight: Tensor
    collected: LayerStatistics
    dense: LayerStatistics


def _losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def _inputs(kind: str, generator: torch.Generator) -> Tensor:
    if kind == "Embedding":
        # Of no two words the same count, so that no answer is one of several.
        counts = torch.arange(2, IN + 2)
        words = torch.repeat_interleave(torch.arange(IN), counts)
        length = len(words) // ROWS
        return words[torch.randperm(len(words), generator=generator)][: ROWS * length].view(
            ROWS, -1
        )

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Channels and neighbours go together, and have a mean.
    x = torch.einsum("rchw,cd->rdhw", draw(ROWS, IN // 2, LENGTH, 3), draw(IN // 2, IN // 2))
    return 0.4 * (x + 0.5 * x.roll(1, 2)) + draw(1, IN // 2, 1, 1)


@cache
def layer(kind: str) -> Layer:
    """``"Conv2d"`` or ``"Embedding"``, of the sizes of `common.layer`, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _Network(kind).double().eval()
    generator = torch.Generator().manual_seed(2)
    x = _inputs(kind, generator)
    batches = [
        {"x": x[rows], "labels": torch.arange(ROWS)[rows] % 3}
        for rows in torch.arange(ROWS).split(7)
    ]
    found = lorainit.collect_statistics(
        network,
        LoraConfig(r=common.RANK, target_modules=["layer"]),
        data=batches,
        needs=STATISTICS - {"weight_error"},
        loss_fn=_losses,
        progress=False,
    )["layer"]
    true = reference.reference(
        network, ["layer"], batches, lambda model, batch: list(_losses(model, batch))
    )["layer"]
    weight = network.layer.weight.detach()  # type: ignore[union-attr, operator]
    weight = weight.flatten(1) if kind == "Conv2d" else weight.mT
    error = 0.1 * torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / IN**0.5
    own: dict[str, Any] = {"weight_error": error, "population": 500.0}
    dense = LayerStatistics(
        gradient_sum=true.G * true.sequences,
        input_second_moment_sum=true.Sx * true.positions,
        input_sum=true.mean * true.positions,
        output_second_moment_sum=true.Sy * true.positions,
        sequences=found.sequences,
        label_tokens=found.label_tokens,
        positions=float(true.positions),
        **own,
    )
    return Layer(weight, replace(found, **own), dense)


def _as_matrix(moment: Any) -> Tensor:
    return moment if isinstance(moment, Tensor) else moment.dense()


def error_of(kind: str, name: str) -> float:
    """Of what is collected, against the truth."""
    found, true = layer(kind).collected, layer(kind).dense
    return relative(_as_matrix(getattr(found, name)), _as_matrix(getattr(true, name)))


def other_layout(kind: str) -> float:
    """The control: patches or words that lie in another order."""
    found, true = layer(kind).collected, layer(kind).dense
    return relative(found.gradient.flip(1), true.gradient)


def _optima(kind: str, module: str) -> list[Check]:
    """A module's checks, made with this layer in place of its own; methods are given what was collected."""
    own = layer(kind)
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    first: Callable[..., Any] = common.layer
    solving: Callable[..., Any] = common.solve

    def given(*sizes: Any, **settings: Any) -> tuple[Tensor, LayerStatistics]:
        if sizes or settings:
            found: tuple[Tensor, LayerStatistics] = first(*sizes, **settings)
            return found
        return own.weight, own.dense

    def solve(
        method: Any, weight: Tensor, statistics: LayerStatistics, *rest: Any, **settings: Any
    ) -> Any:
        statistics = own.collected if statistics is own.dense else statistics
        return solving(method, weight, statistics, *rest, **settings)

    common.layer, common.solve = given, solve  # type: ignore[assignment]
    try:
        spec.loader.exec_module(again)
    finally:
        common.layer, common.solve = first, solving  # type: ignore[assignment]
    found: list[Check] = getattr(again, "CHECKS", None) or again.PEERS
    return found


def _serves(kind: str, method: str) -> bool:
    """An embedding gets no anchor, so methods that need one leave it as it is."""
    if kind == "Conv2d":
        return True
    own = layer(kind)
    return not common.solve(method, own.weight, own.collected).anchored


def _of_one_metric(check: Check) -> bool:
    """One-hot inputs are uncorrelated: QERA's exact metric is its diagonal one, and no control for it."""
    return check.control and check.method == "qera" and check.name.count("QERA(") == 2


def checks(kind: str) -> list[Check]:
    """All of one kind of layer."""
    modules = "tests.methods.optima", "tests.methods.optima_peers"
    of_methods = {str(c): c for module in modules for c in _optima(kind, module)}
    served = {method for method in STARTS if _serves(kind, method)}
    names = ("gradient", "input_second_moment", "input_mean", "output_second_moment")
    return [
        *(
            Check(kind, f"{name} (autograd)", 1e-12, lambda n=name: error_of(kind, n))  # type: ignore[misc]
            for name in names
        ),
        Check(kind, "control: another layout", 0.1, lambda: other_layout(kind), control=True),
        *(
            replace(check, name=f"{kind}: {check.name}")
            for check in of_methods.values()
            if check.method in served and not (kind == "Embedding" and _of_one_metric(check))
        ),
    ]


KINDS = ("Conv2d", "Embedding")


def all_checks() -> list[Check]:
    """Of all kinds."""
    return [check for kind in KINDS for check in checks(kind)]
