"""EVA: the directions in which a layer's inputs vary most.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", NeurIPS 2025,
arXiv 2410.07170. Checked against PEFT's `initialize_lora_eva_weights`, which finds the same
directions by incremental PCA, batch after batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number, require_types
from lorainit.types import Diagonal, Factors, LayerStatistics


@dataclass(frozen=True)
class EVA:
    r"""``A`` = top right singular vectors of the inputs, ``B = 0``.

    The right singular vectors of all inputs, stacked, are the eigenvectors of their second moment::

        C = Sx - mean mean^T   (centered)   or   Sx,      A = eigenvectors of C, largest first

    Rank redistribution is a decision over all layers, so it is not taken here: `explained_variance`
    gives what it is taken by, and `rho` says how far it may go.

    Args:
        centered: take the inputs' mean out first, as incremental PCA does (PEFT, the authors' code).
        rho: a layer may get up to ``rho`` times its configured rank when `get_peft_model`
            redistributes ranks by explained variance; 1 keeps every rank as configured.

    Deviations from PEFT: eigenvectors of the moments of all the data, where PEFT's incremental PCA
    keeps only as many components as it needs from batch to batch and stops by a cosine threshold;
    no ``whiten`` option.
    """

    centered: bool = True
    rho: float = 2.0

    reads_weight: ClassVar[bool] = False

    workspace: ClassVar[int] = 3
    """A solve in float32 takes so many times the bytes of a stack's statistics and gradient, beside them."""

    def __post_init__(self) -> None:
        require_types(self)
        require_number("rho", self.rho, above=1.0)

    @property
    def needs(self) -> frozenset[str]:
        """``input_second_moment``, and ``input_mean`` where inputs are centred."""
        names = {"input_second_moment"}
        return frozenset(names | {"input_mean"} if self.centered else names)

    @classmethod
    def paper(cls) -> EVA:
        """The authors' settings: centred, ``rho`` 2."""
        return cls(centered=True, rho=2.0)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: with ``input_second_moment``, and ``input_mean`` if `centered`.
            rank: number of directions.
            scaling: not used.

        Returns:
            ``A`` ``(..., rank, in)`` with orthonormal rows, ``B`` ``(..., out, rank)`` of zeros;
            not anchored, since ``B A = 0``.
        """
        del scaling
        rows, columns = weight.shape[-2:]
        linalg.check_rank(rank, rows, columns)
        second = self._covariance(statistics)
        dtype = linalg.compute_dtype(weight, second)
        vectors = linalg.largest_eigenvectors(second.to(dtype), rank)[1]
        a = vectors.mT.contiguous().to(weight.device)
        b = torch.zeros(*weight.shape[:-2], rows, rank, dtype=dtype, device=weight.device)
        return Factors(a, b, anchored=False)

    def rank_values(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """What each of a layer's directions is worth: `explained_variance`."""
        return self.explained_variance(statistics, max_rank)

    def explained_variance(self, statistics: LayerStatistics, max_rank: int) -> Tensor:
        """Share of the inputs' variance along each of a layer's leading directions.

        Args:
            statistics: of one layer or a stack of layers, as `solve` takes them.
            max_rank: how many directions, at most ``in``.

        Returns:
            ``(..., max_rank)``, descending, each between 0 and 1: eigenvalue over trace. Inputs
            without any variance give zeros.
        """
        second = self._covariance(statistics)
        linalg.check_rank(max_rank, *second.shape[-2:])
        second = second.to(linalg.compute_dtype(second))
        values = linalg.largest_eigenvectors(second, max_rank)[0].clamp_min(0)
        total = second.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return values / total.clamp_min(torch.finfo(values.dtype).tiny)

    def _covariance(self, statistics: LayerStatistics) -> Tensor:
        """``C`` of the class docstring, ``(..., in, in)``."""
        second = linalg.check_finite(statistics.input_second_moment, "the input second moment")
        if not self.centered:
            return second
        mean = linalg.check_finite(statistics.input_mean, "the input mean")
        if isinstance(second, Diagonal):
            return second.minus_outer(mean)
        # A mean is nobody else's tensor; layers that share an input share it too, and are served once.
        shared = second.dim() == 4 and second.stride(1) == 0
        own, means = (second[:, :1], mean[:, :1]) if shared else (second, mean)
        for index in product(*map(range, own.shape[:-2])):
            own[index].addr_(means[index], means[index], alpha=-1)
        return second
