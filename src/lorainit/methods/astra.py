"""Astra: the part of the pretrained weight inside a leading or trailing output subspace.

Liu et al., "Astra: Activation-Space Tail-Eigenvector Low-Rank Adaptation of Large Language Models",
Findings of ACL 2026, arXiv 2602.19111. Checked against the authors' release as read (github
LyoAI/Astra, commit 7c77e96, ``astra.py``) and PEFT's port of it (``peft/tuners/lora/astra.py``, after
0.21). Both call the *last* columns of ``torch.linalg.eigh`` the tail; those are the largest eigenvalues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_choice
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class Astra:
    r"""``A = V^T W``, ``B = V``, with ``V`` eigenvectors of the second moment of the layer's outputs.

    The outputs ``W x`` have the second moment ``C = W Sx W^T``. With ``V`` ``(out, rank)`` its
    eigenvectors::

        B = V,   A = V^T W

    With the largest eigenvalues ``B A = V V^T W`` is the matrix of rank ``rank`` whose outputs are
    closest to those of ``W`` on the data (Eckart-Young for ``W Sx^(1/2)``); with the smallest, the
    outputs of ``B A`` are the least that orthonormal ``V`` allow. The start is anchored.

    Args:
        select: ``"highest"`` (default), what the release's scripts and PEFT's port take; ``"lowest"``,
            as the name and the abstract ("tail eigenvectors") read, and the release's ``"KPM"``.
            In a layer with more outputs than inputs the lowest eigenvalues are zero: ``V`` is then
            orthogonal to every output, and ``A`` zero to rounding. They take a dense decomposition of
            an ``(out, out)`` matrix a layer.

    The factors stand as they are: as in the release, the scaling is not divided out, so the adapter's
    part of the start is ``s V V^T W``.

    Deviations from the release: ``C`` comes from the inputs' moment over all counted tokens, without
    the layer's bias, where the release divides every call's outputs by their signed maximum, takes the
    first sequence of a batch only, and counts padding; ranks by the outputs' effective rank (its
    ``rank_allocation``, off by default) are left out.
    """

    select: Literal["highest", "lowest"] = "highest"

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment"})

    def __post_init__(self) -> None:
        require_choice("select", self.select, ("highest", "lowest"))

    @classmethod
    def paper(cls) -> Astra:
        """What the release's scripts run: the largest eigenvalues."""
        return cls(select="highest")

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: with ``input_second_moment``.
            rank: number of eigenvectors.
            scaling: not used: the adapter's scaling stays on top.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)`` with orthonormal columns; anchored.
        """
        del scaling
        linalg.check_rank(rank, *weight.shape[-2:])
        second = linalg.check_finite(statistics.input_second_moment, "the input second moment")
        dtype = linalg.compute_dtype(weight, second)
        wide = linalg.double_precision(linalg.check_finite(weight.to(dtype), "the weight"))
        # The smallest eigenvalues of a product in float32 are rounding.
        outputs = wide @ (linalg.double_precision(second).to(wide.device) @ wide.mT)
        outputs = (outputs + outputs.mT) / 2
        if self.select == "highest":
            vectors = linalg.largest_eigenvectors(outputs, rank)[1]
        else:
            vectors = linalg.fix_signs(linalg.eigh(outputs)[1][..., :rank])
        a, b = (vectors.mT @ wide).to(dtype), vectors.to(dtype)
        return Factors(a.to(weight.device), b.contiguous().to(weight.device), anchored=True)
