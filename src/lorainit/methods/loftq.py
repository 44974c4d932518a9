"""LoftQ: the largest part of what quantization took from the weight, in the Frobenius norm.

Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024, arXiv
2310.08659, algorithm 1 with one step. Checked against PEFT's ``loftq_utils`` and read beside the
authors' release (github yxli2123/LoftQ, ``utils.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorainit import linalg
from lorainit.methods._settings import require_number
from lorainit.methods._weight_error import weight_error
from lorainit.types import Factors, LayerStatistics


@dataclass(frozen=True)
class LoftQ:
    r"""Top singular triplets of ``E = W - Q``, full-precision weight less quantized one.

    With ``E = U S V^T``, ``rank`` triplets kept::

        s B A = U S V^T,   A = (S / s)^(1/2) V^T,   B = U (S / s)^(1/2)

    Among all matrices of the rank it is the closest to ``E`` in the Frobenius norm (Eckart, Young). It
    reads no data: directions that no input takes count as much as any other. Not anchored: the model
    starts nearer to the full-precision one. Needs ``reference_weights`` of `get_peft_model`.

    Deviations from the algorithm: the base is never quantized again (the algorithm alternates between
    that and the cut), and ``s`` is divided out; PEFT's ``replace_lora_weights_loftq`` does not divide,
    so that its start is ``s`` times too long.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    needs_reference: ClassVar[bool] = True

    @classmethod
    def paper(cls) -> LoftQ:
        """The defaults: the algorithm has no settings but its number of steps, one here."""
        return cls()

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``, the base weight; only its shape is read.
            statistics: with ``weight_error``.
            rank: number of triplets.
            scaling: the layer's ``s``, divided out of the product; above zero.

        Returns:
            ``A`` ``(..., rank, in)``, ``B`` ``(..., out, rank)``, of equal singular values; not anchored.
        """
        linalg.check_rank(rank, *weight.shape[-2:])
        require_number("scaling", scaling, inclusive=False)
        error = weight_error(statistics, "LoftQ")
        a, b = linalg.split_evenly(*linalg.top_singular(error, rank))
        return Factors(a / scaling**0.5, b / scaling**0.5, anchored=False)
