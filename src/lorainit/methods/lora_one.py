"""LoRA-One: one best rank-r step of full gradient descent.

Zhang, Liu, Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language
Models, Provably and Efficiently", ICML 2025, arXiv 2502.01235, algorithm 1 (its initialization; the
preconditioned optimizer is not part of this package). Checked against the authors' release as read
(github YuanheZ/LoRA-One, ``run_exp.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import (
    ROW_NORM,
    TRUST_REGION,
    require_choice,
    require_number,
    require_types,
)
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class LoraOne:
    r"""Top singular triplets of ``-G``, split by square roots, at spectral norm ``1 / gamma``.

    With ``-G = U S V^T`` and the first ``rank`` triplets::

        A = (S / S_1)^(1/2) V^T / sqrt(gamma),   B = U (S / S_1)^(1/2) / sqrt(gamma)

    so that ``B A`` is ``-1 / (gamma S_1)`` times the best rank-``rank`` approximation of ``G``. Not
    anchored: the model starts displaced by ``s B A``, on purpose.

    Args:
        gamma: both factors are divided by its root.
        output_scale: multiply both factors by ``out^(1/4)`` too. The release's configuration
            (``scale: stable``) does; the formula of the paper does not.
        scale: ``"paper"``: the factors above. ``"calibrated"``: ``A = V^T / sqrt(3)``, rows of a
            default LoRA row's norm, and ``B A`` has the length at which held-back sequences have the
            least loss, measured by `get_peft_model`, no layer moving by more than a quarter of its
            weight's norm.

    Deviations from the release: singular triplets to a residual tolerance instead of a randomized
    SVD with the global generator. A layer whose gradient is zero gets ``B = 0`` and orthogonal rows
    of ``A``, where the formula has 0 / 0.
    """

    gamma: float = 128.0
    output_scale: bool = False
    scale: Literal["paper", "calibrated"] = "paper"

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    reads_weight: ClassVar[bool] = False

    trust_region: ClassVar[float] = TRUST_REGION
    """Where the length is measured, see `Natural`."""

    workspace: ClassVar[int] = 7
    """A solve in float32 takes so many times the bytes of a stack's statistics and gradient, beside them."""

    def __post_init__(self) -> None:
        require_types(self)
        require_number("gamma", self.gamma, inclusive=False)
        require_choice("scale", self.scale, ("paper", "calibrated"))

    @property
    def calibrated(self) -> bool:
        """Whether the length is to be measured."""
        return self.scale == "calibrated"

    @classmethod
    def paper(cls) -> LoraOne:
        """The paper's formula, gamma 128."""
        return cls(gamma=128.0)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: with ``gradient``.
            rank: number of triplets.
            scaling: not used: the adapter's scaling stays on top.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; not anchored.
        """
        del scaling
        rows, columns = weight.shape[-2:]
        linalg.check_rank(rank, rows, columns)
        dtype = linalg.compute_dtype(weight, statistics)
        gradient = linalg.check_finite(statistics.gradient.to(dtype), "the gradient")
        u, s, v = linalg.top_singular(-gradient, rank)
        first = s[..., :1]
        share = s / torch.where(first > 0, first, torch.ones_like(first))
        if self.calibrated:
            a, b = v.mT * ROW_NORM, u * share.unsqueeze(-2) / ROW_NORM
            return Factors(a.to(weight.device), b.to(weight.device), anchored=False)
        size = (rows**0.25 if self.output_scale else 1.0) / self.gamma**0.5
        a, b = linalg.split_evenly(u, share, v)
        a = torch.where(first.unsqueeze(-1) > 0, a, v.mT)
        return Factors((size * a).to(weight.device), (size * b).to(weight.device), anchored=False)
