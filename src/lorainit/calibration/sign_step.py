"""The first step of an optimizer like Adam on one layer's factors: a step of their gradients' signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorainit.models.displacement import LowRank
from lorainit.types import Factors


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
