"""The first two steps of Adam on one layer's factors, from gradients of the loss with respect to its weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit.models.displacement import LowRank
from lorainit.types import Factors

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of torch's and transformers' AdamW."""

LARGEST_NORM = 1.0
"""Gradients are clipped to it, all factors' together, as transformers' ``max_grad_norm`` does unless told."""

WARMUP = (0.2, 0.4)
"""Shares of the peak rate at which the two steps are taken: a warmup whose steps are ``(i + 1) / 5`` of it."""

Gradient = tuple[Tensor, Tensor]
"""Of the loss with respect to ``A`` ``(rank, in)`` and ``B`` ``(out, rank)``."""


@dataclass(frozen=True, eq=False)
class AdamSteps:
    """One layer's factors where training begins.

    Attributes:
        start: ``A`` ``(rank, in)``, ``B`` ``(out, rank)``, in float32 or float64.
        scaling: the layer's ``s``.
    """

    start: Factors
    scaling: float

    def gradient(self, weight_gradient: Tensor, at: Factors) -> Gradient:
        """Of the factors at `at`, from that of the layer's weight, ``(out, in)``, there."""
        # The products where the large one is.
        a, b = at.A.to(weight_gradient), at.B.to(weight_gradient)
        pair = b.mT @ weight_gradient, weight_gradient @ a.mT
        return pair[0].to(at.A) * self.scaling, pair[1].to(at.B) * self.scaling

    def after_one(self, rate: float, first: Gradient) -> Factors:
        """The factors after one step at the first share of a peak rate: of signs, but for `EPSILON`."""
        updates = [g / (g.abs() + EPSILON) for g in first]
        return self._moved(self.start, updates, rate * WARMUP[0])

    def after_two(self, rate: float, first: Gradient, second: Gradient) -> Factors:
        """The factors after a second step, with its gradient at `after_one`."""
        (b1, b2), updates = BETAS, []
        for g1, g2 in zip(first, second, strict=True):
            mean = (b1 * g1 + g2) / (1 + b1)
            square = (b2 * g1.square() + g2.square()) / (1 + b2)
            updates.append(mean / (square.sqrt() + EPSILON))
        return self._moved(self.after_one(rate, first), updates, rate * WARMUP[1])

    def _moved(self, factors: Factors, updates: list[Tensor], rate: float) -> Factors:
        a, b = updates
        return Factors(factors.A - rate * a, factors.B - rate * b, factors.anchored)

    def term(self, at: Factors) -> LowRank:
        """What the layer's weight is displaced by where its factors are `at`, beside the base's."""
        if not self.start.anchored:
            return LowRank(at.B * self.scaling, at.A)
        # B A - B0 A0 as what moved: in half precision the difference of the products would vanish.
        a, b = self.start.A, self.start.B
        left = torch.cat([at.B - b, b], dim=1) * self.scaling
        return LowRank(left, torch.cat([at.A, at.A - a]))


def clip(gradients: Mapping[str, Gradient]) -> None:
    """Scale them, in place, so that the norm of all of them together is at most `LARGEST_NORM`."""
    halves = [half for pair in gradients.values() for half in pair]
    total = torch.nn.utils.get_total_norm(halves)
    factor = (LARGEST_NORM / total.clamp_min(LARGEST_NORM)).item()
    for half in halves:
        half.mul_(factor)
