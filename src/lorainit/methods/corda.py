"""CorDA: the part of the pretrained weight that matters most (or least) on the data's inputs.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv 2406.05223, equations 2 to 4.
Checked against the authors' release as read (github iboing/CorDA, ``cordalib/decomposition.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import (
    require_choice,
    require_damping,
    require_number,
    require_types,
)
from lorainit.types import DampingMode, Factors, LayerStatistics


@dataclass(frozen=True)
class CorDA:
    r"""Singular triplets of ``W C``, ``C = Sx + lambda I``, with ``C`` taken back out on the right.

    With ``W C = U S V^T`` and ``rank`` of its triplets::

        s B A = U S V^T C^-1 = U U^T W

    The second form follows from ``S V^T = U^T W C`` and needs no inverse; it is the one used. With
    the top triplets ``s B A`` is the rank-``rank`` matrix closest to ``W`` in the norm ``|X C|_F``.
    The start is anchored.

    Args:
        mode: ``"ipm"`` (instruction-previewed): the top triplets, those that the data use most;
            ``"kpm"`` (knowledge-preserved): the bottom ones, which the data use least.
        balanced: split every rank-one term into factors of equal norm. False: as the release does,
            ``B = U (S/s)^(1/2)`` and ``A = (S/s)^(1/2) V^T C^-1``, whose sizes relative to each
            other follow the units of ``Sx``.
        damping: added to the diagonal of ``Sx``, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of the diagonal (the release); or
            ``"absolute"``.

    Deviations from the release: ``C`` is the mean over counted tokens of ``x x^T``, where the
    release divides every sequence by its signed maximum and sums over tokens; damping is not
    doubled until an explicit inverse passes a check, since no inverse is taken.
    """

    mode: Literal["ipm", "kpm"] = "ipm"
    balanced: bool = True
    damping: float = 0.01
    damping_mode: DampingMode = "relative"

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment"})

    def __post_init__(self) -> None:
        require_types(self)
        require_choice("mode", self.mode, ("ipm", "kpm"))
        require_damping(self.damping, self.damping_mode)

    @classmethod
    def paper(cls) -> CorDA:
        """Settings of the authors' release: ipm, its split of the factors, damping 0.01."""
        return cls(mode="ipm", balanced=False, damping=0.01, damping_mode="relative")

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: with ``input_second_moment``.
            rank: number of triplets.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)`` with orthogonal columns; anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        second = statistics.input_second_moment
        dtype = linalg.compute_dtype(weight, second)
        weight = linalg.check_finite(weight.to(dtype), "the weight")
        second = linalg.check_finite(second.to(dtype), "the input second moment")
        context = linalg.add_to_diagonal(
            second,
            linalg.damping_value(
                second.diagonal(dim1=-2, dim2=-1), self.damping, self.damping_mode
            ),
        )
        triplets = linalg.top_singular if self.mode == "ipm" else linalg.bottom_singular
        u, s, _ = triplets(weight @ context, rank)
        projected = u.mT @ weight
        # B's column norm: (S/s)^(1/2) in the release, or the root of the term's own norm.
        size = projected.norm(dim=-1) if self.balanced else s
        size = (size / scaling).sqrt()
        a = projected / (scaling * size.clamp_min(torch.finfo(dtype).tiny)).unsqueeze(-1)
        return Factors(a, u * size.unsqueeze(-2), anchored=True)
