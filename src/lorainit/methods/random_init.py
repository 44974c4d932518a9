"""Starts that read nothing: Gaussian and Orthogonal, as PEFT has them (`Vanilla` is its default).

Orthogonal: datta0, "Rethinking LoRA initialisation", datta0.github.io/posts/rethink-lora-init.
Checked against PEFT's ``"gaussian"`` and ``"orthogonal"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.errors import RankError
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class Gaussian:
    """``A`` normal with standard deviation ``1 / rank``, ``B = 0``: reads nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_weight: ClassVar[bool] = False

    @classmethod
    def paper(cls) -> Gaussian:
        """The same: there is nothing to set."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Draw from torch's global generator, layer after layer.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: not read.
            rank: of the factors.
            scaling: not used.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)`` of zeros; not anchored.
        """
        del statistics, scaling
        *batch, rows, columns = weight.shape
        linalg.check_rank(rank, rows, columns)
        dtype = linalg.compute_dtype(weight)
        (a,) = per_layer(batch, lambda: (torch.randn(rank, columns, dtype=dtype) / rank,))
        b = torch.zeros(*batch, rows, rank, dtype=dtype)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=False)


@dataclass(frozen=True)
class Orthogonal:
    r"""Two random factors that live in orthogonal halves of the rank, so ``B A = 0``: reads
    nothing.

    With ``Q`` a random orthogonal ``(rank, rank)`` matrix, ``X`` and ``Y`` standard normal::

        A = (X Q[0::2])^T / 10,   B = Y^T Q[1::2] / 10

    Both are of rank ``rank / 2``, neither is zero, and their product vanishes to rounding. The rank
    must be even.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_weight: ClassVar[bool] = False

    @classmethod
    def paper(cls) -> Orthogonal:
        """The same: there is nothing to set."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Draw from torch's global generator, layer after layer.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: not read.
            rank: of the factors, even.
            scaling: not used.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; not anchored, since ``B A = 0``.

        Raises:
            RankError: the rank is odd.
        """
        del statistics, scaling
        *batch, rows, columns = weight.shape
        linalg.check_rank(rank, rows, columns)
        if rank % 2:
            raise RankError(
                f"Orthogonal needs an even rank, got {rank}. Use {rank + 1} or {rank - 1}."
            )
        dtype = linalg.compute_dtype(weight)

        def draw() -> tuple[Tensor, Tensor]:
            q = torch.linalg.qr(torch.randn(rank, rank, dtype=dtype)).Q
            a = (torch.randn(columns, rank // 2, dtype=dtype) @ q[0::2]).mT / 10
            b = torch.randn(rank // 2, rows, dtype=dtype).mT @ q[1::2] / 10
            return a.contiguous(), b

        a, b = per_layer(batch, draw)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=False)


def per_layer(batch: list[int], draw: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One draw a layer, stacked: a stack of layers takes what the layers would take one by one."""
    if not batch:
        return draw()
    drawn = zip(*(draw() for _ in range(math.prod(batch))), strict=True)
    return tuple(torch.stack(parts).reshape(*batch, *parts[0].shape) for parts in drawn)
