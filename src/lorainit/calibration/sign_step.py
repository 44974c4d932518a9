"""The first step of an optimizer like Adam on one layer's factors: a step of their gradients' signs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorainit.models.displacement import LowRank
from lorainit.types import Factors

LEAST_ROW = 0.5
"""A row of `A` counts as at least so long; one of plain LoRA's is ``1/sqrt(3)``, about 0.58."""


@dataclass(frozen=True, eq=False)
class SignStep:
    """One layer's factors where the model is the base, and the signs of the loss's gradient there.

    Adam's first update is ``m / (sqrt(v) + eps)`` of one gradient, that is its sign, times the rate. An
    anchored pair is the base as it is; of any other the base is at ``B = 0``, where the gradient of ``A``
    is zero.

    Attributes:
        factors: ``A`` ``(rank, in)``, ``B`` ``(out, rank)``, in float32.
        scaling: the layer's ``s``.
        sign_a: ``(rank, in)``; None where it is zero.
        sign_b: ``(out, rank)``.
    """

    factors: Factors
    scaling: float
    sign_a: Tensor | None
    sign_b: Tensor

    @classmethod
    def of(cls, factors: Factors, scaling: float, gradient: Tensor) -> SignStep:
        """From the gradient of the loss with respect to the layer's weight, ``(out, in)``."""
        a, b = (half.detach().to(gradient) for half in (factors.A, factors.B))
        sign_b = torch.sign(gradient @ a.mT)
        sign_a = torch.sign(b.mT @ gradient) if factors.anchored else None
        return cls(Factors(a, b, factors.anchored), scaling, sign_a, sign_b)

    def at(self, rate: float) -> LowRank:
        """What the step at this rate adds to the weight: ``s (B' A' - B A)``, or ``s B' A`` from ``B = 0``."""
        a, b = self.factors.A, self.factors.B
        if self.sign_a is None:
            return LowRank(self.sign_b * (-rate * self.scaling), a)
        moved = (b - rate * self.sign_b) * self.scaling
        left = torch.cat([moved, b * -self.scaling], dim=1)
        return LowRank(left, torch.cat([a - rate * self.sign_a, a]))


def lengthened(steps: Mapping[str, SignStep]) -> dict[str, SignStep]:
    """The steps from ``B = 0`` with rows of `A` as long as `LEAST_ROW`, median over layers, or longer.

    Adam moves every entry of `A` by about the rate at each step of a run, however small it is, so short rows
    are long after a few. The first step alone does not move them, and would be longest for the shortest.

    Args:
        steps: by layer.

    Returns:
        The same where rows are long enough, or where the factors are anchored.
    """
    free = {name: step for name, step in steps.items() if step.sign_a is None}
    sizes = [
        float(torch.linalg.vector_norm(s.factors.A)) / len(s.factors.A) ** 0.5
        for s in free.values()
    ]
    sizes = [size for size in sizes if size > 0]
    factor = LEAST_ROW / statistics.median(sizes) if sizes else 1.0
    if factor <= 1:
        return dict(steps)
    longer = {
        name: replace(step, factors=replace(step.factors, A=step.factors.A * factor))
        for name, step in free.items()
    }
    return {name: longer.get(name, step) for name, step in steps.items()}
