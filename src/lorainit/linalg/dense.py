"""Dense decompositions, and what is done with few vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorainit.errors import FactorizationError
from lorainit.linalg.batched import double_precision
from lorainit.linalg.signs import column_signs, fix_triplet_signs
from lorainit.types import Diagonal


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, again in float64 where float32 does not converge."""
    if isinstance(matrix, Diagonal):
        matrix = matrix.dense()
    for attempt in (matrix, double_precision(matrix)):
        try:
            values, vectors = torch.linalg.eigh(attempt)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values.to(matrix), vectors.to(matrix)
    raise FactorizationError(
        "a symmetric eigendecomposition did not converge in float64; the matrix may hold values of "
        "wildly different size. Raise damping or collect statistics from more tokens."
    )


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD as ``(U, S, V)``: ``matrix = U diag(S) V^T``, vectors as columns of ``U`` and ``V``.

    float64 input by LAPACK's SVD. float32 input by the eigenvectors of its Gram matrix in float64,
    which is quicker and, down to singular values of ``1e-8 S[0]``, at least as accurate.
    """
    if matrix.dtype == torch.float64:
        return lapack_svd(matrix)
    return gram_svd(matrix, min(matrix.shape[-2:]))


def lapack_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD as `svd` gives it, by the dense solver of the matrix's dtype."""
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if bool(torch.isfinite(s).all()) and bool(torch.isfinite(u).all()):
            return u, s, vh.mT
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    raise FactorizationError(
        "a singular value decomposition did not converge in float64; look for extreme values in "
        "the weight or the gradient."
    )


def gram_svd(
    matrix: Tensor, k: int, leading: Callable[[Tensor, int], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``k`` triplets of a float32 matrix by way of the smaller Gram matrix, in float64.

    The QR decomposition in place of a division by singular values keeps the second set of vectors
    orthonormal where singular values vanish.

    Args:
        matrix: ``(..., m, n)``.
        k: how many.
        leading: gives the eigenvectors of the ``k`` largest eigenvalues, those first; default `eigh`.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    work = double_precision(matrix if wide else matrix.mT)
    gram = work @ work.mT
    near = eigh(gram)[1][..., -k:].flip(-1) if leading is None else leading(gram, k)
    far, triangle = torch.linalg.qr(work.mT @ near)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    far = far * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    u, v = (near, far) if wide else (far, near)
    return u.to(matrix), diagonal.abs().to(matrix), v.to(matrix)


def bottom_singular(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last ``k`` of the ``min(m, n)`` singular triplets of ``(..., m, n)``, signs fixed; dense.

    Returns:
        ``(..., m, k)``, ``(..., k)`` descending, ``(..., n, k)``.
    """
    u, s, v = svd(matrix)
    return fix_triplet_signs(u[..., -k:], s[..., -k:], v[..., -k:])


def split_evenly(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``U diag(s) V^T`` as ``B A`` with the roots of ``s`` on both sides; returns ``(A, B)``."""
    root = s.sqrt()
    return v.mT * root.unsqueeze(-1), u * root.unsqueeze(-2)


def orthonormal_rows(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The product ``left right^T`` with orthonormal rows on its right side.

    Args:
        left: ``(..., m, k)``.
        right: ``(..., n, k)`` of full column rank.

    Returns:
        ``rows`` ``(..., k, n)`` orthonormal, and ``content`` ``(..., m, k)`` with orthogonal
        columns, longest first, ``content @ rows = left right^T``: rows are the product's right
        singular vectors, signs fixed.
    """
    basis, triangle = torch.linalg.qr(right)
    content = left @ triangle.mT
    wide = double_precision(content)
    rotation = eigh(wide.mT @ wide)[1].flip(-1).to(content)
    columns = basis @ rotation
    signs = column_signs(columns)
    return (columns * signs).mT, content @ (rotation * signs)
