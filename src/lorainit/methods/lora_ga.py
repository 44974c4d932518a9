"""LoRA-GA: factors whose first gradient step follows the full gradient.

Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv
2407.05000, theorem 3.1 and section 3.3. Checked against the authors' release as read (github
Outsider565/LoRA-GA, their fork of ``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_choice, require_number, require_types
from lorainit.types import Factors, LayerStatistics

_DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
_SCALES = ("stable", "gd", "unit", "weightS")


@dataclass(frozen=True)
class LoraGA:
    r"""Right singular vectors of the gradient for ``A``, *other* left ones for ``B``.

    With ``G = U S V^T`` and its first ``2 rank`` triplets, ``I_A`` and ``I_B`` two disjoint sets of
    ``rank`` of them::

        A = c V[:, I_A]^T,   B = c U[:, I_B]

    Any such pair gives the best rank-``2 rank`` first step of the product (theorem 3.1). The start
    is anchored. Needs ``2 rank <= min(out, in)``.

    Args:
        direction: ``"ArB2r"``: ``A`` from triplets 1..r, ``B`` from r+1..2r; ``"A2rBr"``: the
            reverse; ``"ArBr"``: ``B`` from the odd ones (1st, 3rd, ...), ``A`` from the even ones;
            ``"random"``: disjoint sets drawn with `seed`.
        scale: ``c``: ``"stable"``: ``out^(1/4) / sqrt(gamma)``; ``"gd"``: ``1 / s``; ``"unit"``: 1;
            ``"weightS"``: the mean root of the weight's top ``rank`` singular values, over
            ``sqrt(s)``.
        gamma: of the stable scale.
        seed: of the random direction: the same sets in every layer and every run.

    Deviations from the release: singular vectors to a residual tolerance instead of a randomized
    SVD with the global generator; no ``norm_clip``. PEFT 0.21's ``"lora_ga"`` is another formula:
    ``B`` is multiplied by the singular values, its stable scale multiplies ``B`` only, and its
    random direction takes the *same* triplets for both factors.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "gd", "unit", "weightS"] = "stable"
    gamma: float = 16.0
    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    rank_factor: ClassVar[int] = 2
    """A layer's rank times this must not exceed ``min(out, in)``."""

    workspace: ClassVar[int] = 6
    """A solve in float32 takes so many times the bytes of a stack's statistics and gradient, beside them."""

    def __post_init__(self) -> None:
        require_types(self)
        require_choice("direction", self.direction, _DIRECTIONS)
        require_choice("scale", self.scale, _SCALES)
        require_number("gamma", self.gamma, inclusive=False)

    @classmethod
    def paper(cls) -> LoraGA:
        """The paper's settings: ArB2r, stable scale, gamma 16."""
        return cls(direction="ArB2r", scale="stable", gamma=16.0)

    @property
    def reads_weight(self) -> bool:
        """Whether the scale is one of the weight's."""
        return self.scale == "weightS"

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; read for its singular values under ``scale="weightS"`` only.
            statistics: with ``gradient``.
            rank: of the factors; half the number of triplets that are found.
            scaling: the layer's ``s``, read by the scales ``"gd"`` and ``"weightS"``.

        Returns:
            ``A`` ``(..., rank, in)`` and ``B`` ``(..., out, rank)``, rows and columns orthogonal
            and of norm ``c``; anchored.

        Raises:
            RankError: ``2 rank`` is above ``min(out, in)``.
        """
        linalg.check_rank(rank, *weight.shape[-2:], factor=self.rank_factor)
        dtype = linalg.compute_dtype(weight, statistics)
        gradient = linalg.check_finite(statistics.gradient.to(dtype), "the gradient")
        u, _, v = linalg.top_singular(gradient, 2 * rank)
        for_a, for_b = self._indices(rank)
        size = self._size(weight, dtype, rank, scaling)[..., None, None]
        a = v[..., for_a.to(v.device)].mT * size
        b = u[..., for_b.to(u.device)] * size
        return Factors(a.contiguous().to(weight.device), b.to(weight.device), anchored=True)

    def _indices(self, rank: int) -> tuple[Tensor, Tensor]:
        """Which of the ``2 rank`` triplets ``A`` and ``B`` take, ``(rank,)`` each."""
        order = torch.arange(2 * rank)
        if self.direction == "ArB2r":
            return order[:rank], order[rank:]
        if self.direction == "A2rBr":
            return order[rank:], order[:rank]
        if self.direction == "ArBr":
            return order[1::2], order[0::2]
        drawn = torch.randperm(2 * rank, generator=torch.Generator().manual_seed(self.seed))
        return drawn[:rank], drawn[rank:]

    def _size(self, weight: Tensor, dtype: torch.dtype, rank: int, scaling: float) -> Tensor:
        """``c`` of the class docstring, ``(...)``."""
        one: Tensor = torch.ones(weight.shape[:-2], dtype=dtype, device=weight.device)
        if self.scale == "unit":
            return one
        if self.scale == "stable":
            return one * math.sqrt(math.sqrt(weight.shape[-2]) / self.gamma)
        require_number("scaling", scaling, inclusive=False)
        if self.scale == "gd":
            return one / scaling
        wide = linalg.check_finite(weight.to(dtype), "the weight")
        values = linalg.top_singular(wide, rank)[1]
        return one * (values / scaling).sqrt().mean(-1)
