"""Vanilla LoRA: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685, as PEFT initializes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number, require_types
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class Vanilla:
    """``A`` uniform in ``+-1/sqrt(in)`` (Kaiming, ``a = sqrt(5)``), ``B = 0``: reads nothing.

    `get_peft_model` leaves the weights that PEFT itself drew, so a run with this method is the
    plain PEFT run with the same seed.

    Args:
        size: rows of ``A`` so many times as long, drawn anew where it is not 1. With an optimizer like
            Adam the first steps move the outputs by so much more, at the same learning rate.
    """

    size: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_weight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_types(self)
        require_number("size", self.size, inclusive=False)

    @property
    def uses_default_start(self) -> bool:
        """Whether it is PEFT's own: at size 1."""
        return self.size == 1

    @classmethod
    def paper(cls) -> Vanilla:
        """The same: PEFT's own."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Draw from torch's global generator.

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
        a = torch.empty(*batch, rank, columns, dtype=dtype).uniform_(-1, 1)
        a *= self.size / columns**0.5
        b = torch.zeros(*batch, rows, rank, dtype=dtype)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=False)
