"""CG-LoRA: the leading directions of a gradient whitened by the curvature.

Zheng, Proutiere, "Curvature-Guided LoRA: Matching Full Fine-Tuning in Function Space", arXiv 2603.29824
(version 1: "Steering in the pretrained NTK subspace"). What could be read of it is the abstract and
summaries, not the algorithm's listing nor the code (github fredML/CG-LoRA): the direction is the
paper's, the size of the factors is not, see the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import (
    ROW_NORM,
    TRUST_REGION,
    require_choice,
    require_damping,
    require_number,
)
from lorainit.types import DampingMode, Factors, LayerStatistics


@dataclass(frozen=True)
class CGLoRA:
    r"""A Newton-like step with K-FAC's factors, cut to rank r where it is whitened.

    To change the predictions as full fine-tuning would, a step of low rank has to match the Newton-like
    step in the metric of the curvature. With ``X = Sx + lambda_x I``, ``Y = Sy + lambda_y I``, the
    K-FAC factors (one of them the identity where `sides` names the other)::

        M     = -Y^(-1/2) G X^(-1/2) = U S V^T,  its first `rank` triplets kept
        Delta =  Y^(-1/2) U S V^T X^(-1/2)

    and ``B A = Delta / (gamma |Delta|_2)``, split by square roots of Delta's own singular values. Roots
    are Cholesky factors: another root leaves ``Delta`` as it is. Not anchored: the model starts displaced
    by ``s B A``.

    This is `Natural`'s direction (at the same damping); what `Natural` has beside it is a length and a
    number of directions that are measured, the size of its rows, its refusal, and further steps. With
    neither side it would be `LoraOne`.

    Args:
        sides: ``"both"``: whiten by inputs and outputs; ``"input"`` or ``"output"``: by one of them.
            With ``"input"`` the output moment is not needed.
        gamma: both factors are divided by its root. The paper's own size is not known here: this is
            LoRA-One's, the nearest relative's.
        damping: added to the diagonals of the factors, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of the factor's own diagonal; ``"absolute"``.
        anchored: take the start out again in the forward; in LoRA-GA's words, shift the weight. The
            paper reports the form without a shift as the better one.
        scale: ``"fixed"``: the factors above. ``"calibrated"``: ``A`` has rows of a default LoRA row's
            norm, ``1/sqrt(3)``, and ``B A`` has the length at which held-back sequences have the least
            loss, measured by `get_peft_model`, no layer moving by more than a quarter of its weight's
            norm.
    """

    sides: Literal["both", "input", "output"] = "both"
    gamma: float = 128.0
    damping: float = 0.1
    damping_mode: DampingMode = "relative"
    anchored: bool = False
    scale: Literal["fixed", "calibrated"] = "fixed"

    trust_region: ClassVar[float] = TRUST_REGION
    """Where the length is measured, no layer moves by more than this share of its weight's norm."""

    def __post_init__(self) -> None:
        require_choice("sides", self.sides, ("both", "input", "output"))
        require_number("gamma", self.gamma, inclusive=False)
        require_damping(self.damping, self.damping_mode)
        require_choice("scale", self.scale, ("fixed", "calibrated"))
        if self.anchored and self.calibrated:
            raise ValueError(
                "an anchored start does not move the model, so there is no length to measure: "
                "leave scale at 'fixed', or anchored at False"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The gradient, and the second moments of the sides that are whitened."""
        moments = {"input": ("input_second_moment",), "output": ("output_second_moment",)}
        sides = ("input", "output") if self.sides == "both" else (self.sides,)
        return frozenset({"gradient"}.union(*(moments[side] for side in sides)))

    @property
    def calibrated(self) -> bool:
        """Whether the length is to be measured."""
        return self.scale == "calibrated"

    @classmethod
    def paper(cls) -> CGLoRA:
        """Both sides, not anchored; damping and size are this package's."""
        return cls(sides="both", anchored=False)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its shape, dtype and device are read.
            statistics: with ``gradient`` and what `needs` names beside it.
            rank: number of triplets.
            scaling: not used: the adapter's scaling stays on top.

        Returns:
            ``A`` ``(..., rank, in)`` with orthogonal rows, ``B`` ``(..., out, rank)`` with orthogonal
            columns, those of the largest singular values first.
        """
        del scaling
        linalg.check_rank(rank, *weight.shape[-2:])
        dtype = linalg.compute_dtype(weight, statistics)
        rows, content = linalg.orthonormal_rows(*self._step(statistics, rank))
        sizes = torch.linalg.vector_norm(content, dim=-2)
        first = sizes.amax(-1, keepdim=True)
        # A gradient that is zero has no direction: B is zero, and A keeps orthogonal rows.
        share = sizes / torch.where(first > 0, first, torch.ones_like(first))
        tiny = torch.finfo(sizes.dtype).tiny
        columns = content / sizes.clamp_min(tiny).unsqueeze(-2)
        if self.calibrated:
            a, b = rows * ROW_NORM, columns * (share / ROW_NORM).unsqueeze(-2)
        else:
            root = (share / self.gamma).sqrt()
            a, b = rows * root.unsqueeze(-1), columns * root.unsqueeze(-2)
            a = torch.where(first.unsqueeze(-1) > 0, a, rows / self.gamma**0.5)
        a, b = a.to(weight.device, dtype), b.to(weight.device, dtype)
        return Factors(a, b, anchored=self.anchored)

    def _step(self, statistics: LayerStatistics, rank: int) -> tuple[Tensor, Tensor]:
        """``Delta`` as ``left right^T``: ``(..., out, rank)`` and ``(..., in, rank)``, float64."""
        gradient = linalg.check_finite(statistics.gradient, "the gradient")
        whitened = linalg.double_precision(gradient)
        inputs = outputs = None
        if self.sides != "input":
            outputs = self._root(statistics.output_second_moment, "the output second moment")
            whitened = linalg.solve_triangular(outputs, whitened.to(outputs), upper=False)
        if self.sides != "output":
            inputs = self._root(statistics.input_second_moment, "the input second moment")
            whitened = linalg.solve_triangular(
                inputs.mT, whitened.to(inputs), upper=True, left=False
            )
        u, s, v = linalg.top_singular(whitened.to(linalg.compute_dtype(gradient)), rank)
        left, right = -linalg.double_precision(u * s.unsqueeze(-2)), linalg.double_precision(v)
        if outputs is not None:
            left = linalg.solve_triangular(outputs.mT, left.to(outputs), upper=True)
        if inputs is not None:
            right = linalg.solve_triangular(inputs.mT, right.to(inputs), upper=True)
        return left, right.to(left)

    def _root(self, second: Tensor, what: str) -> Tensor:
        """Lower Cholesky factor of a damped second moment, in float64."""

        def factor(moment: Tensor) -> Tensor:
            diagonal = linalg.double_precision(moment.diagonal(dim1=-2, dim2=-1))
            damping = linalg.damping_value(diagonal, self.damping, self.damping_mode)
            return linalg.damped_cholesky(moment, damping, what)

        return linalg.once(factor, second)
