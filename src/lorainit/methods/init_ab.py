"""Init[AB]: both factors random and small.

Li et al., "Beyond Zero Initialization: Investigating the Impact of Non-Zero Initialization on LoRA
Fine-Tuning Dynamics", ICML 2025, arXiv 2505.23194. Their code (github Leopold1423/non_zero_lora-icml25)
could not be read; the bounds are those of a port that names it (github hhnqqq/MyTransformers, commit
4037d4d, ``nzlora.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number
from lorainit.methods.random_init import per_layer
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class InitAB:
    """``A`` and ``B`` uniform in ``+-sqrt(scale / in)``: reads nothing.

    Both of LoRA's factors have the size that it gives to ``A``, so that each gets a gradient from the
    first step on. Not anchored: the model starts displaced by ``s B A``, which is noise of about
    ``s scale sqrt(rank out / in) / 3`` in Frobenius norm at equal scales, and which the paper finds to
    do no harm.

    Args:
        scale_a: of the variance of ``A``: ``scale / (3 in)``. 1 is LoRA's own.
        scale_b: of the variance of ``B``, in the same units; the paper finds a wide range to do.
        anchored: take the noise out again, in the forward; the paper's variant that starts at the
            pretrained model.
    """

    scale_a: float = 1.0
    scale_b: float = 1.0
    anchored: bool = False

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        require_number("scale_a", self.scale_a, inclusive=False)
        require_number("scale_b", self.scale_b, inclusive=False)

    @classmethod
    def paper(cls) -> InitAB:
        """The variance of the paper's main runs for both factors, not anchored."""
        return cls(scale_a=1.0, scale_b=1.0, anchored=False)

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
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; anchored if asked for.
        """
        del statistics, scaling
        *batch, rows, columns = weight.shape
        linalg.check_rank(rank, rows, columns)
        dtype = linalg.compute_dtype(weight)

        def draw() -> tuple[Tensor, Tensor]:
            a = torch.empty(rank, columns, dtype=dtype).uniform_(-1, 1)
            b = torch.empty(rows, rank, dtype=dtype).uniform_(-1, 1)
            return a * (self.scale_a / columns) ** 0.5, b * (self.scale_b / columns) ** 0.5

        a, b = per_layer(batch, draw)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=self.anchored)
