"""MiLoRA: the minor part of the pretrained weight.

Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
NAACL 2025, arXiv 2406.09044, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class MiLoRA:
    r"""Bottom singular triplets of ``W / s``, split by square roots; reads the weight only.

    With ``W = U S V^T`` and the last ``rank`` of its ``min(out, in)`` triplets::

        A = (S / s)^(1/2) V^T,   B = U (S / s)^(1/2)

    so that ``W - s B A`` is the best approximation of ``W`` of rank ``min(out, in) - rank``. The
    start is anchored. A weight that misses rank has singular values of zero (to rounding), and the
    pairs made of those are zero (to rounding) in both factors: such directions hardly train. That
    is the method's own definition, kept as it is.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def paper(cls) -> MiLoRA:
        """The same: there is nothing to set."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: not read.
            rank: number of triplets.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; anchored.
        """
        del statistics
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        weight = linalg.check_finite(weight.to(linalg.compute_dtype(weight)), "the weight")
        u, s, v = linalg.bottom_singular(weight, rank)
        a, b = linalg.split_evenly(u, s / scaling, v)
        return Factors(a, b, anchored=True)
