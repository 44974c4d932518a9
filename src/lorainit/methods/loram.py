"""LoRAM: fixed orthogonal bases at the magnitude of the pretrained weight.

Zhang et al., "The Primacy of Magnitude in Low-Rank Adaptation", NeurIPS 2025, arXiv 2507.06558. The
formulas are those of the paper's method section as a published summary gives them; the authors' code
(github zhangzicheng-jd/LoRAM) could not be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.errors import RankError
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class LoRAM:
    r"""Discrete sine bases for both factors, as long as the weight is large: reads its norm only.

    With ``Phi_n[i, j] = sqrt(2 / (n + 1)) sin((i + 1)(j + 1) pi / (n + 1))``, orthonormal columns, the
    first ``rank`` of them, and ``Q = log(rank) / log(min(out, in))``::

        A = beta Phi_in^T,   B = beta Phi_out,   beta^2 = sqrt(Q / rank) |W|_F

    so that ``|B A|_F = sqrt(Q) |W|_F``: ``Q`` stands for the share of ``|W|_F^2`` that the leading
    ``rank`` singular values of a weight have, so that the start is as large as PiSSA's without its
    directions. The start is anchored. At rank 1 ``Q`` is zero, and so would be both factors: refused.

    The scaling is not divided out: the paper's formula is that of ``s = 1``. Under rsLoRA, which the
    paper recommends beside it, the adapter's part of the start is ``s B A``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def paper(cls) -> LoRAM:
        """The same: there is nothing to set."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its norm is read.
            statistics: not read.
            rank: of the factors, at least 2.
            scaling: not used: the adapter's scaling stays on top.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``, orthogonal rows and columns of one
            norm, ``beta``; anchored.

        Raises:
            RankError: the rank is 1.
        """
        del statistics, scaling
        rows, columns = weight.shape[-2:]
        linalg.check_rank(rank, rows, columns)
        if rank == 1:
            raise RankError("LoRAM needs a rank of at least 2: at 1 both factors are zero. Use 2.")
        dtype = linalg.compute_dtype(weight)
        weight = linalg.check_finite(weight.to(dtype), "the weight")
        norm = linalg.double_precision(weight).norm(dim=(-2, -1))
        gain = math.log(rank) / math.log(min(rows, columns))
        beta = (norm * math.sqrt(gain / rank)).sqrt().to(weight)[..., None, None]
        a, b = (sine_basis(size, rank).to(weight) for size in (columns, rows))
        return Factors(beta * a.mT, beta * b, anchored=True)


def sine_basis(size: int, count: int) -> Tensor:
    """First `count` columns of the orthonormal discrete sine basis (type I), ``(size, count)``, float64."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    grid = torch.outer(index, index[:count])
    return math.sqrt(2 / (size + 1)) * torch.sin(grid * (math.pi / (size + 1)))
