"""QERA: what quantization took from the weight, as the layer's inputs see it.

Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction", ICLR 2025, arXiv
2410.06040, theorems 1 (exact) and 2 (approximate, diagonal). CLoQ (arXiv 2501.18475) has the objective
of the first. Read beside the authors' release (github ChengZhang-98/QERA, ``src/qera/approximate.py``
and ``src/loqer/statistic_profiler/scale.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_choice, require_damping, require_number
from lorainit.methods._weight_error import factors_of_terms, weight_error
from lorainit.types import DampingMode, Factors, LayerStatistics


@dataclass(frozen=True)
class QERA:
    r"""The rank-r matrix closest to ``E = W - Q`` in the norm of the layer's outputs.

    With ``X = Sx + lambda I``, or only its diagonal, and ``E X^(1/2) = U S V^T`` cut to ``rank``
    triplets::

        s B A = U S V^T X^(-1/2) = U U^T E

    Among all matrices ``D`` of the rank it minimises ``|(E - D) X^(1/2)|_F``, for ``X = Sx`` the mean
    over counted positions of ``|(E - D) x|^2``. The second form needs no inverse; it is the one used,
    and any root of ``X`` gives the same ``U``: here Cholesky's. Not anchored: the model starts nearer to
    the full-precision one. Needs ``reference_weights`` of `get_peft_model`.

    Args:
        form: ``"exact"``: with all of ``Sx``; ``"diagonal"``: with its diagonal, which is exact where
            different inputs are uncorrelated.
        balanced: split every rank-one term into a row and a column of equal norm. False: as the paper
            does, ``B = U`` and ``A = U^T E / s``.
        damping: added to the diagonal of ``Sx`` (exact form), see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of the diagonal; or ``"absolute"``.

    Deviations from the release: no square root of a matrix and no inverse are taken, so that damping
    replaces its noise on singular values; its inputs are those of the quantized model by default here,
    as statistics are; ``s`` is divided out; the low-rank term is not quantized.
    """

    form: Literal["exact", "diagonal"] = "exact"
    balanced: bool = True
    damping: float = 0.01
    damping_mode: DampingMode = "relative"

    needs: ClassVar[frozenset[str]] = frozenset({"input_second_moment"})
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("form", self.form, ("exact", "diagonal"))
        require_damping(self.damping, self.damping_mode)

    @classmethod
    def paper(cls) -> QERA:
        """The exact form with the paper's split; damping is what its release's noise is for."""
        return cls(form="exact", balanced=False)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``, the base weight; only its shape is read.
            statistics: with ``input_second_moment`` and ``weight_error``.
            rank: number of triplets.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)`` with orthogonal columns; not anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        error = weight_error(statistics, "QERA")
        return factors_of_terms(
            *self.term(error, statistics, rank), scaling, balanced=self.balanced
        )

    def term(self, error: Tensor, statistics: LayerStatistics, rank: int) -> tuple[Tensor, Tensor]:
        """``s B A`` as ``left right``, ``(..., out, rank)`` and ``(..., rank, in)``, strongest first.

        Args:
            error: ``(..., out, in)``, ``E``.
            statistics: with ``input_second_moment``.
            rank: number of triplets.
        """
        seen = self._as_inputs_see(error, statistics.input_second_moment)
        u, _, _ = linalg.top_singular(seen, rank)
        return u, u.mT @ error

    def _as_inputs_see(self, error: Tensor, second: Tensor) -> Tensor:
        """``E X^(1/2)``, up to an orthogonal matrix on its right."""
        if self.form == "diagonal":
            second = linalg.check_finite(second, "the input second moment")
            diagonal = second.diagonal(dim1=-2, dim2=-1)
            return error * diagonal.clamp_min(0).sqrt().unsqueeze(-2).to(error)
        root = linalg.damped_root(
            second, self.damping, self.damping_mode, "the input second moment"
        )
        return linalg.whole_product(error, linalg.once(lambda matrix: matrix.to(error), root))
