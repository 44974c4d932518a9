"""OLoRA: an orthonormal start from the QR decomposition of the pretrained weight.

Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775,
algorithm 1. Checked against PEFT's ``"olora"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class OLoRA:
    r"""First columns of ``Q`` and rows of ``R`` in ``W = Q R``; reads the weight only.

    ::

        B = Q[:, :rank],   A = R[:rank] = B^T W

    The factors stand as they are: as in PEFT, the scaling is not divided out, so the adapter's part
    of the start is ``s B B^T W``, and anchored. The first ``rank`` columns of ``Q`` depend on the
    first ``rank`` columns of ``W`` only, so only those are decomposed.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def paper(cls) -> OLoRA:
        """The same: there is nothing to set."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: not read.
            rank: number of columns of ``Q``.
            scaling: not used.

        Returns:
            ``A`` ``(..., rank, in)``, its first ``rank`` columns upper triangular; ``B``
            ``(..., out, rank)`` with orthonormal columns; anchored.
        """
        del statistics, scaling
        linalg.check_rank(rank, *weight.shape[-2:])
        weight = linalg.check_finite(weight.to(linalg.compute_dtype(weight)), "the weight")
        q, r = torch.linalg.qr(weight[..., :rank])
        a = torch.cat([r, q.mT @ weight[..., rank:]], dim=-1)
        return Factors(a, q.contiguous(), anchored=True)
