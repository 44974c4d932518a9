"""The first step of an optimizer like Adam on one layer's factors: a step of their gradients' signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit.models.displacement import LowRank
from lorainit.types import Factors

LEAST_ROW = 0.5
"""The rows of a layer's `A` count as at least so long in the mean square; plain LoRA's are ``1/sqrt(3)``."""


@dataclass(frozen=True, eq=False)
class SignStep:
    """One layer's factors where the model is the base, and the signs of the loss's gradient there.

    Adam's first update is ``m / (sqrt(v) + eps)`` of one gradient, that is its sign, times the rate. An
    anchored pair is the base as it is; of any other the base is at ``B = 0``, where the gradient of ``A``
    is zero, and short rows of it are lengthened (`with_long_rows`).

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
        a = a if factors.anchored else with_long_rows(a)
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


def with_long_rows(a: Tensor) -> Tensor:
    """Rows of ``A`` ``(rank, in)`` as a few of Adam's steps leave them: of a root mean square of `LEAST_ROW`.

    Adam moves every entry by about the rate at each step of a run, however small it is, so short rows are long
    after a few, in directions that are not their own. The first step from ``B = 0`` does not move them at all,
    and would be longest for the shortest. What is missing is added as signs drawn at random, the same every
    time. Rows that are long enough stay as they are, and so do zero ones, which no optimizer moves.
    """
    moving = a.ne(0).any(-1)
    square = float(a.square().sum()) / max(int(moving.sum()), 1)
    if not 0 < square < LEAST_ROW**2:
        return a
    generator = torch.Generator().manual_seed(0)
    signs: Tensor = torch.randint(0, 2, a.shape, generator=generator).to(a) * 2 - 1
    missing = ((LEAST_ROW**2 - square) / a.shape[-1]) ** 0.5
    return a.add(signs * moving.unsqueeze(-1), alpha=missing)
