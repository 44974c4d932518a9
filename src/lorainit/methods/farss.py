"""FARSS: singular pairs of the pretrained weight, scored by what they do to the predictions.

Chen et al., "FARSS: Fisher-Optimized Adaptive Low-Rank and Singular-Vector Selection for
Knowledge-Preserving Fine-Tuning", Findings of ACL 2026. Checked against the authors' release as read
(github chenyehuang/FARSS, commit 2ddae1f, ``init.py``, method ``grad-kfac``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods.filet import fisher_energy
from lorainit.types import Factors, LayerSpec, LayerStatistics
from lorainit.types.numbers import require_count


@dataclass(frozen=True)
class FARSS:
    r"""Singular triplets of ``W`` with the lowest (or highest) Fisher energy, split by square roots.

    With ``W = U S V^T``, under the Kronecker Fisher the triplet ``S_k u_k v_k^T`` has the energy::

        e_k = S_k^2 (v_k^T Sx v_k) (u_k^T Sy u_k)

    which is FILet's of the singular pair, times ``S_k^2``: in proportion to what the loss changes by, to
    second order, where the triplet is left out. With the ``rank`` triplets chosen::

        A = S^(1/2) V^T,   B = U S^(1/2)

    The start is anchored. The scaling is not divided out, as in the release (whose scripts have
    ``alpha = rank``, so ``s = 1``): the adapter's part of the start is ``s`` times the triplets.

    Args:
        highest_from: triplets of the lowest energy below this rank, of the highest from it on; the
            release's rule, with 128.
        early_blocks: so many first blocks of the model get smaller ranks, see `ranks`; 0 (default): every
            layer keeps the configured one. The release's scripts have 5 and 7 of 32.

    Singular values at rounding are no candidates: both factors of such a triplet would be zero, and
    would stay so.

    Deviations from the release: second moments over counted tokens and of each sequence's own loss,
    where the release takes eight batches, at most 1,024 positions of each drawn at random, padding
    among them.
    """

    highest_from: int = 128
    early_blocks: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "output_second_moment"})

    def __post_init__(self) -> None:
        require_count("highest_from", self.highest_from)
        require_count("early_blocks", self.early_blocks, least=0)

    @classmethod
    def paper(cls) -> FARSS:
        """The release's: lowest energies below rank 128, smaller ranks in the first 5 blocks (of 32)."""
        return cls(highest_from=128, early_blocks=5)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: with ``input_second_moment`` and the full ``output_second_moment``.
            rank: number of triplets.
            scaling: not used: the adapter's scaling stays on top.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``, orthogonal rows and columns, those of
            the largest singular values first; anchored.
        """
        del scaling
        linalg.check_rank(rank, *weight.shape[-2:])
        second = statistics.input_second_moment
        dtype = linalg.compute_dtype(weight, second)
        weight = linalg.check_finite(weight.to(dtype), "the weight")
        u, s, v = linalg.svd(weight)
        u, v = linalg.fix_pair_signs(u, v)
        moments = second.to(dtype), statistics.output_second_moment.to(dtype)
        energy = s.square() * fisher_energy(u, v, *moments)
        linalg.check_finite(energy, "the Fisher energy")
        descending = rank >= self.highest_from
        # Below this a singular value is rounding.
        real = s > torch.finfo(dtype).eps * max(weight.shape[-2:]) * s[..., :1]
        worst = torch.full_like(energy, -torch.inf if descending else torch.inf)
        ranked = torch.where(real, energy, worst)
        kept = ranked.argsort(dim=-1, descending=descending, stable=True)[..., :rank]
        kept = kept.sort(dim=-1)[0]
        u, v = (
            matrix.gather(-1, kept.unsqueeze(-2).expand(*matrix.shape[:-1], rank))
            for matrix in (u, v)
        )
        a, b = linalg.split_evenly(u, s.gather(-1, kept), v)
        return Factors(a, b, anchored=True)

    def importance(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """``tr(Sy W Sx W^T) / (out in)``, ``(...)``: the Fisher energy of a layer's whole weight.

        Args:
            weight: ``(..., out, in)``.
            statistics: as `solve` takes them.
        """
        wide = linalg.double_precision(linalg.check_finite(weight, "the weight"))
        inputs = linalg.double_precision(statistics.input_second_moment)
        outputs = linalg.double_precision(statistics.output_second_moment)
        energy: Tensor = ((outputs @ wide) * (wide @ inputs)).sum((-2, -1))
        return energy / (weight.shape[-2] * weight.shape[-1])

    @property
    def redistributes(self) -> bool:
        """Whether ranks other than the configured ones are asked for."""
        return self.early_blocks > 0

    def ranks(
        self, importance: Mapping[str, float], layers: Mapping[str, LayerSpec]
    ) -> dict[str, int]:
        """The release's ranks: in the first blocks the more important a layer, the smaller.

        Of ``n`` layers in the first blocks, layer ``l`` gets the rank
        ``n a (1 / I_l) / sum_k (1 / I_k)``, rounded, between 1 and half of its configured rank, where
        ``a`` is 50 / 128 of it: the release's bounds at its rank, 128. All others keep their rank.

        Args:
            importance: `importance` by layer name.
            layers: of the same layers; the block is the first number in the name.

        Returns:
            Rank by layer name.
        """
        ranks = {name: spec.rank for name, spec in layers.items()}
        early = [name for name in layers if _block(name) < self.early_blocks]
        total = sum(importance[name] for name in early)
        inverse = {n: 1 / ((importance[n] / total if total > 0 else 1.0) + 1e-12) for n in early}
        unit = sum(inverse.values()) / max(len(early), 1)
        for name in early:
            rank = layers[name].rank
            wanted = round(rank * 50 / 128 * inverse[name] / unit)
            ranks[name] = max(1, min(rank // 2, wanted))
        return ranks


def _block(name: str) -> float:
    """The first number among a module name's parts; infinite where there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return float(found[1]) if found else math.inf
