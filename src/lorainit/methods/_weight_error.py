"""What methods for quantized bases share: reading ``E = W - Q``, and factors of a projection of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.errors import MissingStatisticError
from lorainit.types import Factors, LayerStatistics


def weight_error(statistics: LayerStatistics, method: str) -> Tensor:
    """``E`` ``(..., out, in)``, checked, in the dtype of factors.

    Args:
        statistics: with ``weight_error``.
        method: how to name the method in an error.

    Raises:
        MissingStatisticError: it is not there.
        NonFiniteError: it is not finite.
    """
    error = statistics.weight_error
    if error is None:
        raise MissingStatisticError(
            f"{method} needs the weights that the base was quantized from: pass reference_weights=... to "
            "get_peft_model, or set 'weight_error' of the statistics."
        )
    error = error.to(linalg.compute_dtype(statistics))
    return linalg.check_finite(error, "what quantization took from the weight")


def factors_of_terms(left: Tensor, right: Tensor, scaling: float, *, balanced: bool) -> Factors:
    """``A`` and ``B`` with ``scaling * B A = left right``, not anchored.

    Args:
        left: ``(..., out, rank)``.
        right: ``(..., rank, in)``.
        scaling: above zero.
        balanced: give row and column of every rank-one term equal norms; if not, ``B`` is `left`.
    """
    if not balanced:
        return Factors(right / scaling, left, anchored=False)
    tiny = torch.finfo(left.dtype).tiny
    columns, rows = left.norm(dim=-2), right.norm(dim=-1)
    # Each is divided by its own norm: the quotient of two would leave float32's range earlier.
    size = (columns * rows / scaling).sqrt()
    a = right * (size / rows.clamp_min(tiny)).unsqueeze(-1)
    b = left * (size / columns.clamp_min(tiny)).unsqueeze(-2)
    return Factors(a, b, anchored=False)
