"""A method defined outside the package, by the public interface alone: it asks for all that a method may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lorainit
from lorainit.methods import METHODS
from lorainit.types import (
    Factors,
    KeepsParameters,
    LayerStatistics,
    LeavesItToHeads,
    LowRankStep,
    MeasuresLength,
    Method,
    RanksDirections,
    RefusesStart,
    TakesSteps,
    UsesDefaultStart,
)
from tests.adapters.tiny import batch, config, llama


@dataclass(frozen=True)
class SteepestDescent:
    """Steps along the gradient's leading singular directions."""

    wanted: float = 0.0
    steps: int = 2
    rho: float = 2.0
    trust_region: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    calibrated: ClassVar[bool] = True
    seen: ClassVar[list[tuple[str, Any]]] = []

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        step = self.step(statistics, rank)
        a, b = self.factors(step.left, step.right, scaling, statistics)
        return Factors(a, b)

    def step(self, statistics: LayerStatistics, rank: int) -> LowRankStep:
        u, s, v = torch.linalg.svd(-statistics.gradient, full_matrices=False)
        return LowRankStep(u[..., :rank] * s[..., None, :rank], v[..., :rank, :])

    def factors(
        self,
        left: Tensor,
        right: Tensor,
        scaling: float,
        statistics: LayerStatistics,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return right, left / scaling

    def rank_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        return torch.linalg.svdvals(statistics.gradient)[..., :max_rank]

    def refusal(self, gain: float, *, share: bool = True) -> str | None:
        self.seen.append(("gain", gain))
        return (
            None if gain >= self.wanted else f"which is not the {self.wanted:.0%} that was wanted"
        )


def data(count: int = 6) -> list[dict[str, Tensor]]:
    return [batch(seed=seed) for seed in range(count)]


def started(method: Any, **options: Any) -> Any:
    return lorainit.get_peft_model(
        llama(), config(r=4), method=method, data=data(), progress=False, **options
    )


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return sum(float(model(**rows).loss) for rows in data()) / 6


def ranks_of(model: Any) -> list[int]:
    return [p.shape[0] for n, p in model.named_parameters() if "lora_A" in n]


def test_it_is_asked_for_all_that_it_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    take = SteepestDescent.step

    def spy(self: SteepestDescent, statistics: LayerStatistics, rank: int) -> LowRankStep:
        asked.append("step")
        return take(self, statistics, rank)

    monkeypatch.setattr(SteepestDescent, "step", spy)
    SteepestDescent.seen.clear()
    model = started(SteepestDescent())
    one = started(SteepestDescent(steps=1))
    # A measured length: the loss is below the base's, and a second step lowers it further.
    assert loss_of(model) < loss_of(one) < loss_of(llama())
    # Redistributed ranks: the same sum, not all alike.
    assert sum(ranks_of(model)) == 4 * len(ranks_of(model))
    assert len(set(ranks_of(model))) > 1
    assert set(ranks_of(started(SteepestDescent(rho=1.0)))) == {4}
    assert asked
    assert [name for name, _ in SteepestDescent.seen] == ["gain"] * 3
    assert all(0 < gain < 1 for _, gain in SteepestDescent.seen)


def test_a_refused_start_is_plain_lora(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    plain = started(lorainit.Vanilla())
    torch.manual_seed(3)
    with caplog.at_level("INFO", logger="lorainit"):
        refused = started(SteepestDescent(wanted=0.99))
    assert "which is not the 99% that was wanted" in caplog.text
    theirs = dict(plain.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in refused.named_parameters())
    # The negative control: a start that is taken is another one.
    torch.manual_seed(3)
    taken = started(SteepestDescent())
    assert any(
        not torch.equal(p, theirs.get(n, p.new_empty(0))) for n, p in taken.named_parameters()
    )


@dataclass(frozen=True)
class Direction:
    """A fixed direction that needs no statistics, and whose length is measured."""

    trust_region: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset()
    calibrated: ClassVar[bool] = True

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        return Factors(weight[..., :rank, :].clone(), torch.ones_like(weight[..., :rank]))


def test_a_length_can_be_measured_without_statistics() -> None:
    model = started(Direction())
    assert loss_of(model) <= loss_of(llama()) + 1e-6


def test_protocols_of_the_packages_own_methods() -> None:
    """A method that has a protocol's members is found by it; the others are not."""
    found = {
        protocol: {name for name, kind in METHODS.items() if isinstance(kind(), protocol)}
        for protocol in (
            TakesSteps,
            RefusesStart,
            LeavesItToHeads,
            RanksDirections,
            KeepsParameters,
            MeasuresLength,
            UsesDefaultStart,
        )
    }
    assert all(isinstance(kind(), Method) for kind in METHODS.values())
    assert found[TakesSteps] == found[RefusesStart] == {"natural", "auto"}
    assert found[LeavesItToHeads] == {"auto"}
    assert found[RanksDirections] >= {"natural", "auto", "eva", "kronecker-qer"}
    assert found[KeepsParameters] == {"kronecker-qer"}
    assert found[MeasuresLength] >= {"natural", "auto", "lora-da", "lora-one"}
    assert found[UsesDefaultStart] == {"vanilla"}
    # Whatever can be calibrated says how far a layer may go.
    assert all(
        name in found[MeasuresLength]
        for name, kind in METHODS.items()
        if hasattr(kind, "calibrated")
    )
