"""PiSSA: the principal part of the pretrained weight.

Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large
Language Models", NeurIPS 2024, arXiv 2404.02948, equations 2 and 3. Checked against PEFT's
``"pissa"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class PiSSA:
    r"""Top singular triplets of ``W / s``, split by square roots; reads the weight only.

    With ``W = U S V^T`` and the first ``rank`` triplets::

        A = (S / s)^(1/2) V^T,   B = U (S / s)^(1/2)

    so that ``s B A`` is the best rank-``rank`` approximation of ``W``. The start is anchored: the
    model computes at first what it computed before.

    PEFT's ``pissa_niter_k`` has no counterpart: triplets here meet a residual tolerance, whichever
    way they are found, and do not depend on a random generator.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def paper(cls) -> PiSSA:
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
        u, s, v = linalg.top_singular(weight, rank)
        a, b = linalg.split_evenly(u, s / scaling, v)
        return Factors(a, b, anchored=True)
