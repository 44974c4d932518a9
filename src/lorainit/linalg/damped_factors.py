"""Damping, and Cholesky roots."""

from __future__ import annotations

from itertools import cycle, product

import torch
from torch import Tensor

from lorainit.errors import FactorizationError
from lorainit.linalg.batched import double_precision, once
from lorainit.linalg.checks import all_finite, check_finite
from lorainit.linalg.streams import concurrent_streams
from lorainit.types import DampingMode, Diagonal

_FLOOR = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""Squares below are rounded to whole steps of float32's smallest number, in whatever dtype they come here."""
_LOOP_FROM = 256
_AT_ONCE = 2
"""Factorizations on a CUDA device: more of them are no quicker."""


def damping_value(diagonal: Tensor, damping: float, mode: DampingMode) -> Tensor:
    """The ``lambda`` that is added to a factor's diagonal (METHODS.md, Damping).

    Args:
        diagonal: ``(..., n)``, the factor's own diagonal.
        damping: the setting.
        mode: ``"relative"``: ``damping`` times the diagonal's mean; ``"absolute"``: ``damping``.

    Returns:
        ``(...)``. In relative mode never below `_FLOOR`, so that a factor without any signal stays
        invertible.
    """
    if mode == "absolute":
        return torch.full_like(diagonal[..., 0], damping)
    return (damping * diagonal.mean(-1)).clamp_min(_FLOOR)


def add_to_diagonal(matrix: Tensor, value: Tensor) -> Tensor:
    """``matrix + value * I`` for ``(..., n, n)`` and ``(...)``, as a new tensor."""
    out = matrix.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(value.unsqueeze(-1))
    return out


def damped_cholesky(matrix: Tensor, damping: Tensor, what: str) -> Tensor:
    """Lower Cholesky factor of ``matrix + damping * I``; in float64 where float32 fails.

    Args:
        matrix: ``(..., n, n)``, symmetric positive semidefinite up to rounding.
        damping: ``(...)``, its dtype and device are the factor's: a matrix in float32 is factored in
            float64 without a copy before.
        what: how to name the matrix in an error.

    Returns:
        ``(..., n, n)``, lower triangular, in the damping's dtype, or in float64 (and on the CPU,
        where the device has no float64) if only that worked.

    Raises:
        NonFiniteError: the matrix is not finite.
        FactorizationError: not positive definite in float64 either.
    """
    check_finite(matrix, what)
    if isinstance(matrix, Diagonal):
        return _root_of_diagonal(matrix, double_precision(damping), what)
    for attempt in (damping, double_precision(damping)):
        factor, info = _cholesky(matrix.to(attempt.device), attempt)
        # What is not finite anywhere in a row is not finite on the diagonal either.
        if not bool(info.any()) and bool(all_finite(factor.diagonal(dim1=-2, dim2=-1))):
            return factor
    raise _not_definite(what, damping)


def _root_of_diagonal(matrix: Diagonal, damping: Tensor, what: str) -> Tensor:
    values = double_precision(matrix.values) + damping.unsqueeze(-1)
    if not bool((values > 0).all()):
        raise _not_definite(what, damping)
    return Diagonal(values.sqrt())  # type: ignore[return-value]


def _not_definite(what: str, damping: Tensor) -> FactorizationError:
    return FactorizationError(
        f"{what} is not positive definite with damping {float(damping.min()):.3g} added, in "
        "float64 either: the sample spans fewer directions than the layer has, and rounding in "
        "the collected sums exceeds that damping. Use damping_mode='relative' (the default), "
        "raise damping, or collect statistics from more tokens."
    )


def damped_root(second: Tensor, damping: float, mode: DampingMode, what: str) -> Tensor:
    """Lower Cholesky factor of ``second + lambda I`` in float64, once for what is expanded.

    Args:
        second: ``(..., n, n)``, a second moment.
        damping: the setting, see `damping_value`.
        mode: of it.
        what: how to name the matrix in an error.
    """

    def factor(moment: Tensor) -> Tensor:
        diagonal = double_precision(moment.diagonal(dim1=-2, dim2=-1))
        return damped_cholesky(moment, damping_value(diagonal, damping, mode), what)

    return once(factor, second)


def solve_triangular(triangle: Tensor, right: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """``torch.linalg.solve_triangular``, large matrices of a stack one by one on CUDA."""
    if isinstance(triangle, Diagonal):
        return right / (triangle.values.unsqueeze(-1) if left else triangle.values.unsqueeze(-2))
    alone = triangle.dim() == 2
    if alone or not (_one_by_one(triangle) and triangle.shape[:-2] == right.shape[:-2]):
        whole: Tensor = torch.linalg.solve_triangular(triangle, right, upper=upper, left=left)
        return whole
    pairs = zip(triangle.flatten(0, -3), right.flatten(0, -3), strict=True)
    solved = [torch.linalg.solve_triangular(t, r, upper=upper, left=left) for t, r in pairs]
    return torch.stack(solved).reshape(right.shape)


def _one_by_one(matrix: Tensor) -> bool:
    """CUDA's batched factorizations are made for small matrices: large ones go one by one."""
    return matrix.is_cuda and matrix.shape[-1] >= _LOOP_FROM


def _cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``matrix + damping * I`` in the damping's dtype; large ones one by one, and copied once."""
    if not _one_by_one(matrix):
        out = matrix.to(damping.dtype, copy=True)
        out.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
        factor, info = torch.linalg.cholesky_ex(out)
        return factor, info
    # By columns, as LAPACK writes, so that nothing is turned; the matrix is its own transpose.
    columns = torch.empty(matrix.shape, dtype=damping.dtype, device=matrix.device)
    infos = torch.empty(damping.shape, dtype=torch.int32, device=matrix.device)
    # A factorization is a few threads at work on its panels, then all on a product: several at a time.
    with concurrent_streams(matrix.device, min(_AT_ONCE, damping.numel())) as lanes:
        for lane, index in zip(cycle(lanes), product(*map(range, damping.shape))):
            with lane():
                own = columns[index].copy_(matrix[index])
                own.diagonal().add_(damping[index])
                torch.linalg.cholesky_ex(own.mT, out=(own.mT, infos[index]))
    return columns.mT, infos
