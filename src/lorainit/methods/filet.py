"""FILet: directions of the pretrained weight, scored by how strongly predictions react to them.

Feng, Lin, Kao, "Learning in the Fisher Subspace: A Guided Initialization for LoRA Fine-Tuning" (FILet),
ICML 2026, arXiv 2605.01046. Its code was seen only through a third party's
fork, not in the authors' own repository; where text and code disagree, the docstring says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import (
    ROW_NORM,
    require_choice,
    require_number,
    require_types,
)
from lorainit.types import Factors, LayerStatistics
from lorainit.types.numbers import require_count

_RELATIVE_FLOOR = 1e-2


@dataclass(frozen=True)
class FILet:
    r"""Candidate rank-one directions ``u v^T`` of ``W``, ranked by their Fisher energy.

    Candidates: ``"gram"``: the columns of ``W^T W``, normalised, are the ``v_k``, and
    ``u_k = W v_k / |W v_k|``; ``"svd"``: the singular pairs of ``W``. Under the Kronecker Fisher a
    candidate's energy is ``e_k = (v_k^T Sx v_k) (u_k^T Sy u_k)``. With ``q_k`` from the energies of
    the ``rank`` candidates kept::

        A = diag(q) V^T / sqrt(s),   B = U diag(q) / sqrt(s)

    The start is anchored: the model computes at first what it computed before.

    Args:
        candidates: ``"gram"`` (the code's fast route) or ``"svd"``.
        select: ``"lowest"`` energy, the least disturbing directions, as the code does, or
            ``"highest"``, as the paper's abstract reads. The two disagree; the benchmark compares.
        scale_floor: a number: ``q_k = sqrt(max(e_k, scale_floor))``, the code's rule with 1e-8, in
            squared units of the loss. Energies are tiny, so that floor hits often and the start is
            a near-zero pair. None (default): ``q_k`` follows the energies relative to their mean
            over the kept candidates, from a tenth of it up, at the size of a default LoRA row
            (``|A_k|`` about ``1/sqrt(3)``), whatever the units of the loss.
        loss_batch: energies that `scale_floor` is compared with are those of the mean loss of so many
            sequences: ours divided by its square. Exact where all sequences of a batch have as many
            labels (a mean over the batch's labels weighs long ones more), and where padding is none:
            the code averages second moments over every position.
    """

    candidates: Literal["gram", "svd"] = "gram"
    select: Literal["lowest", "highest"] = "lowest"
    scale_floor: float | None = None
    loss_batch: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment", "output_second_moment"})
    layer_workspace: ClassVar[int] = 4
    """Less than 2 was measured on an H200 (a layer of 11,008 inputs)."""

    def __post_init__(self) -> None:
        require_types(self)
        require_choice("candidates", self.candidates, ("gram", "svd"))
        require_choice("select", self.select, ("lowest", "highest"))
        if self.scale_floor is not None:
            require_number("scale_floor", self.scale_floor)
        require_count("loss_batch", self.loss_batch)

    @classmethod
    def paper(cls) -> FILet:
        """The code's settings: gram candidates, lowest energy, absolute floor 1e-8, batches of 8.

        Its runs have rank 32; their ``lora_alpha`` is uncertain: 16, 32 and 64 stand in the fork's
        arguments, script and notes. Factors depend on it by ``1/sqrt(s)`` only, and ``s B A`` not at all.
        """
        return cls(candidates="gram", select="lowest", scale_floor=1e-8, loss_batch=8)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``.
            statistics: with ``input_second_moment`` and the full ``output_second_moment``.
            rank: number of candidates to keep.
            scaling: the layer's ``s``, divided out of the product.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``; anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        second = statistics.input_second_moment
        dtype = linalg.compute_dtype(weight, second)
        narrow = weight if dtype == torch.float32 else weight.to(dtype)
        weight = linalg.check_finite(weight.to(dtype), "the weight")
        moments = second.to(dtype), statistics.output_second_moment.to(dtype)
        if self.candidates == "svd":
            u, s, v = linalg.svd(weight)
            u, v = linalg.fix_pair_signs(u, v)
            energy = fisher_energy(u, v, *moments)
            # Below this a singular value is rounding, and its pair says nothing of the weight.
            valid = s > torch.finfo(s.dtype).eps * max(weight.shape[-2:]) * s[..., :1]
        else:
            energy, valid = gram_energy(weight, narrow, *moments)
        kept = self._keep(linalg.check_finite(energy, "the Fisher energy"), valid, rank)
        if self.candidates == "svd":
            u, v = _columns(u, kept), _columns(v, kept)
        else:
            v = _unit(weight.mT @ _columns(weight, kept))
            u = _unit(weight @ v)
        q = self._sizes(energy.gather(-1, kept), scaling) / scaling**0.5
        return Factors(v.mT * q.unsqueeze(-1), u * q.unsqueeze(-2), anchored=True)

    def _keep(self, energy: Tensor, valid: Tensor, rank: int) -> Tensor:
        """Indices ``(..., rank)`` of the kept candidates; unusable (zero) ones come last."""
        descending = self.select == "highest"
        worst = -torch.inf if descending else torch.inf
        ranked = torch.where(valid, energy, torch.full_like(energy, worst))
        return ranked.argsort(dim=-1, descending=descending, stable=True)[..., :rank]

    def _sizes(self, energy: Tensor, scaling: float) -> Tensor:
        """``q`` ``(..., rank)`` of the kept candidates."""
        if self.scale_floor is not None:
            return (energy / self.loss_batch**2).clamp_min(self.scale_floor).sqrt()
        mean = energy.mean(-1, keepdim=True).clamp_min(torch.finfo(energy.dtype).tiny)
        sizes: Tensor = (energy / mean).clamp_min(_RELATIVE_FLOOR).sqrt()
        return sizes * (ROW_NORM * math.sqrt(scaling))


def fisher_energy(u: Tensor, v: Tensor, second_in: Tensor, second_out: Tensor) -> Tensor:
    """``e_k = (v_k^T Sx v_k) (u_k^T Sy u_k)`` for unit columns, ``(..., k)``."""
    input_part = (v * (second_in @ v)).sum(-2)
    output_part = (u * (second_out @ u)).sum(-2)
    energy: Tensor = input_part * output_part
    return energy


def gram_energy(
    weight: Tensor, narrow: Tensor, second_in: Tensor, second_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Energies of the columns of ``W^T W`` and their images, and which are usable; both ``(..., in)``.

    For a wide weight all goes by ``(out, out)`` matrices, the candidates themselves are not formed:
    ``v_k = W^T w_k`` for a column ``w_k`` of ``W``, so ``v_k^T Sx v_k = w_k^T (W Sx W^T) w_k``.

    Args:
        weight: ``(..., out, in)``.
        narrow: the same, in the dtype that its Gram matrix is quickest in.
        second_in: ``(..., in, in)``, ``Sx``.
        second_out: ``(..., out, out)``, ``Sy``.
    """
    if weight.shape[-1] > weight.shape[-2]:
        image = linalg.gram(narrow.mT).to(weight) @ weight
        v_square = (weight * image).sum(-2).clamp_min(0)
        on_output = linalg.product(second_in, weight.mT)
        input_part = (weight * ((weight @ on_output) @ weight)).sum(-2)
    else:
        v = linalg.gram(narrow).to(weight)
        v_square = v.square().sum(-2)
        input_part = (v * linalg.product(second_in, v)).sum(-2)
        image = weight @ v
    u_square = image.square().sum(-2)
    output_part: Tensor = (image * (second_out @ image)).sum(-2)
    valid = (v_square > 0) & (u_square > 0)
    tiny = torch.finfo(weight.dtype).tiny
    energy: Tensor = (input_part / v_square.clamp_min(tiny)) * (
        output_part / u_square.clamp_min(tiny)
    )
    usable: Tensor = torch.where(valid, energy, torch.zeros_like(energy))
    return usable, valid


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """``(..., m, k)``: the columns with these indices ``(..., k)``."""
    return matrix.gather(-1, index.unsqueeze(-2).expand(*matrix.shape[:-1], index.shape[-1]))


def _unit(matrix: Tensor) -> Tensor:
    """Columns divided by their norms; a zero column stays zero."""
    norm: Tensor = matrix.norm(dim=-2, keepdim=True)
    return matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny)
