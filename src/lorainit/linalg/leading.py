"""Leading and trailing subspaces, by iteration where that is quicker."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorainit.linalg import subspace_iteration
from lorainit.linalg.dense import eigh, gram_svd, lapack_svd
from lorainit.linalg.signs import fix_signs, fix_triplet_signs
from lorainit.linalg.split_precision import SplitMatrix
from lorainit.linalg.thresholds import block_width, dense_limit, iterates, on_matrix_units

_SYMMETRIC_LIMIT = 256
"""The same of leading eigenvectors, whose iteration needs one product a step, not two."""

_BOUND_PRODUCTS = 4

_BOUND_MARGIN = 1.05

EACH = 3e-4
"""In float32 a pair has converged when its residual is below this times its own value: where the spectrum is
flat that is a sine of a few thousandths, and 1e-7 of what the subspace holds (docs/performance.md)."""

_GRAM_LEAST, _GRAM_EACH = 1e-14, 1e-8
"""Of a small Gram matrix in float64: a pair's residual is below the first times the largest value, or the
second times its own; its vectors are those of a dense decomposition to all digits of float32."""

_NOISE = 1e-2
"""How far products of left singular vectors may be from those of orthonormal ones."""

_HASTE = 0.7
"""Of what is allowed: where a rough stage ends, so that the last one has only to measure."""


def smallest_of_operator(
    apply: subspace_iteration.Apply,
    like: Tensor,
    k: int,
    *,
    upper: Tensor,
    tolerance: float | None = None,
    each: float = 0.0,
    rough: subspace_iteration.Apply | None = None,
    coarse: subspace_iteration.Apply | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Orthonormal eigenvectors of the ``k`` smallest eigenvalues of a matrix that is never formed.

    By filtered subspace iteration (`subspace_iteration`), until every residual ``|M v - mu v|`` is
    below ``tolerance`` times the largest absolute eigenvalue sought, or below ``each`` times its own.

    Args:
        apply: what the symmetric ``(..., n, n)`` matrix does to a block ``(..., n, width)``.
        like: any ``(..., n, m)`` tensor of the matrix's batch, size, dtype and device.
        k: how many.
        upper: ``(...)``, a number that no eigenvalue is above, and that none is far below.
        tolerance: default ``1e-10`` in float64; in float32 ``2e-6``, or what rounding allows.
        each: the same for each eigenvalue by itself.
        rough: the same, quicker, on blocks in float32. It measures itself; what it comes to is measured
            by `apply` at the end, and mended by it where it falls short.
        coarse: `rough` with still fewer digits, until the block is near (`subspace_iteration.filtered`).
        start: ``(..., n, width)`` near the vectors sought, where such are known.

    Returns:
        Eigenvalues ``(..., k)`` ascending, eigenvectors ``(..., n, k)``, and all that was iterated on,
        ``(..., n, width)``; None where a dense solver is as quick, or where the iteration does not meet
        its tolerance: form the matrix.
    """
    n = like.shape[-2]
    width = block_width(like, k) if start is None else start.shape[-1]
    if not iterates(like) or 2 * width >= n:
        return None
    goal = _tolerance(like, tolerance)

    def stage(
        times: subspace_iteration.Apply, dtype: torch.dtype, share: float
    ) -> subspace_iteration.Stage:
        def negative(block: Tensor) -> Tensor:
            return -times(block)

        def allowed(values: Tensor) -> Tensor:
            sizes = values.abs()
            largest = sizes.amax(-1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
            wanted = share * torch.maximum(goal * largest, each * sizes)
            # No residual can be asked to be below the rounding of the matrix itself.
            rounding = 8 * torch.finfo(dtype).eps * upper.abs().unsqueeze(-1).to(values)
            return torch.maximum(wanted, rounding)

        ritz = subspace_iteration.symmetric_ritz(negative, k, allowed)
        return subspace_iteration.Stage(negative, ritz, dtype, hasty=share < 1)

    stages = [stage(apply, like.dtype, 1.0)]
    if rough is not None:
        first = stage(rough, torch.float32, _HASTE)
        if coarse is not None:
            first = replace(first, coarse=lambda block: -coarse(block))
        stages.insert(0, first)
    block = _start_block(like, n, width) if start is None else start
    found = subspace_iteration.in_stages(stages, block, k, lower=-upper, settled=start is not None)
    if found is None or not found.converged:
        return None
    return -found.values[..., :k], fix_signs(found.vectors[..., :k]), found.vectors


def bound_of_operator(apply: subspace_iteration.Apply, like: Tensor) -> Tensor:
    """``(...)``: a number that hardly any eigenvalue of a positive definite matrix is above.

    After a few products with a random block the largest Ritz value and its residual; the true largest
    eigenvalue is within a few percent. An iteration is only slower where it is not, see
    `smallest_of_operator`.

    Args:
        apply: what the matrix does to a block.
        like: any ``(..., n, m)`` tensor of the matrix's batch, size, dtype and device.
    """
    n = like.shape[-2]
    block = _start_block(like, n, min(n, subspace_iteration.OVERSAMPLING))
    for _ in range(_BOUND_PRODUCTS):
        # The span is what counts, and its largest vector has not grown out of float32 by then.
        block = apply(block)
        block = block / torch.linalg.vector_norm(block, dim=-2, keepdim=True).clamp_min(1e-30)
    block = subspace_iteration.orthonormal(block)
    found = subspace_iteration.symmetric_ritz(apply, 1, lambda values: values)(block)
    return found.values[..., 0] * (1 + found.error[..., 0]) * _BOUND_MARGIN


def largest_eigenvectors(
    matrix: Tensor, k: int, *, tolerance: float | None = None, each: float | None = None
) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors of the ``k`` largest eigenvalues of a positive semidefinite matrix.

    Dense where it is small, above that by filtered subspace iteration until every residual
    ``|M v - mu v|`` is below ``tolerance`` times the largest eigenvalue or ``each`` times its own (default: in
    float32, where no tolerance is given, `EACH`; else 0), or dense if it never is.

    Returns:
        Eigenvalues ``(..., k)`` descending, eigenvectors ``(..., n, k)``.
    """
    if matrix.dim() == 4 and matrix.stride(1) == 0 and matrix.shape[1] > 1:
        # Layers that share an input.
        found = largest_eigenvectors(matrix[:, 0], k, tolerance=tolerance, each=each)
        values, vectors = (t.unsqueeze(1).expand(-1, matrix.shape[1], *t.shape[1:]) for t in found)
        return values, vectors
    n = matrix.shape[-1]
    width = block_width(matrix, k)
    if n > min(dense_limit(matrix), _SYMMETRIC_LIMIT) and 4 * width < n:
        tiny = torch.finfo(matrix.dtype).tiny

        goal = _tolerance(matrix, tolerance)
        own = _each(matrix, tolerance) if each is None else each
        ritz = subspace_iteration.symmetric_ritz(
            matrix.matmul, k, lambda v: torch.maximum(goal * v[..., :1], own * v).clamp_min(tiny)
        )
        zero = torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
        # In plain float32: halves are no quicker here, and as many bytes again (docs/performance.md).
        pairs = subspace_iteration.filtered(
            matrix.matmul, ritz, _start_block(matrix, n, width), k, lower=zero
        )
        if pairs.converged:
            return pairs.values[..., :k].to(matrix), fix_signs(pairs.vectors[..., :k])
    values, vectors = eigh(matrix)
    return values[..., -k:].flip(-1), fix_signs(vectors[..., -k:].flip(-1))


def largest_eigenvalue(matrix: Tensor, *, near: Tensor) -> Tensor:
    """``(...)``, of a positive semidefinite ``(..., n, n)``, to twelve digits in float64.

    Args:
        matrix: ``(..., n, n)``.
        near: ``(..., n, width)``, vectors among whose combinations its eigenvector may nearly be.
    """
    if near.shape[-1] > 1:
        tiny = torch.finfo(matrix.dtype).tiny
        ritz = subspace_iteration.symmetric_ritz(
            matrix.matmul, 1, lambda v: (1e-6 * v).clamp_min(tiny)
        )
        zero = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
        found = subspace_iteration.filtered(matrix.matmul, ritz, near, 1, lower=zero)
        if found.converged:
            # A value's error is the square of its vector's.
            return found.values[..., 0].clamp_min(0)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values[..., -1].clamp_min(0)


def top_singular(
    matrix: Tensor, k: int, *, tolerance: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``k`` singular triplets ``(U, S, V)`` of ``(..., m, n)``, signs fixed.

    Dense up to `dense_limit` (in the smaller dimension; float32 by the leading eigenvectors of the Gram matrix,
    see `gram_svd`). Above it by filtered subspace iteration
    (`subspace_iteration`), until every residual ``|M^T u - s v|`` is below ``tolerance * S[0]`` (in
    float32 by default also `EACH` times its own value); a dense SVD finishes what does not converge. On
    matrix units residuals are measured by products in `SplitMatrix`, some 1e-7 of ``S[0]`` off.

    Returns:
        ``(..., m, k)``, ``(..., k)`` descending, ``(..., n, k)``.
    """
    small = min(matrix.shape[-2:])
    if small > dense_limit(matrix) and 2 * block_width(matrix, k) < small:
        found = _filtered_svd(matrix, k, _tolerance(matrix, tolerance), _each(matrix, tolerance))
        if found is not None:
            return fix_triplet_signs(*found)
    if matrix.dtype == torch.float64:
        u, s, v = lapack_svd(matrix)
        return fix_triplet_signs(u[..., :k], s[..., :k], v[..., :k])
    return fix_triplet_signs(*gram_svd(matrix, k, _leading_of_gram))


def _leading_of_gram(gram: Tensor, k: int) -> Tensor:
    return largest_eigenvectors(gram, k, tolerance=_GRAM_LEAST, each=_GRAM_EACH)[1]


def largest_singular_value(matrix: Tensor) -> Tensor:
    """``(...)``: the spectral norm of ``(..., m, n)``, to the tolerance of `top_singular`."""
    m, n = matrix.shape[-2:]
    if min(m, n) <= dense_limit(matrix):
        gram = matrix @ matrix.mT if m <= n else matrix.mT @ matrix
        values: Tensor = torch.linalg.eigvalsh(gram)
        return values[..., -1].clamp_min(0).sqrt()
    return top_singular(matrix, 1)[1][..., 0]


def _tolerance(matrix: Tensor, tolerance: float | None) -> float:
    """The one asked for, or the default; in float32 not below the rounding of long sums."""
    if tolerance is not None:
        return tolerance
    if matrix.dtype == torch.float64:
        return 1e-10
    return float(max(2e-6, 2 * torch.finfo(torch.float32).eps * max(matrix.shape[-2:]) ** 0.5))


def _start_block(matrix: Tensor, rows: int, width: int) -> Tensor:
    """The same Gaussian block for every matrix and device, so results do not depend on the RNG."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return block.to(matrix).expand(*matrix.shape[:-2], rows, width)


def _each(matrix: Tensor, tolerance: float | None) -> float:
    """Of a value by itself; a tolerance that was asked for, and float64, are of the largest alone."""
    return EACH if tolerance is None and matrix.dtype == torch.float32 else 0.0


def _filtered_svd(
    matrix: Tensor, k: int, tolerance: float, each: float = 0.0
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets by filtered subspace iteration on ``M^T M``; None without convergence."""
    times: subspace_iteration.Apply = matrix.matmul
    transposed_times: subspace_iteration.Apply = matrix.mT.matmul
    coarse: subspace_iteration.Apply | None = None
    if on_matrix_units(matrix):
        halves = SplitMatrix.of(matrix)
        times, transposed_times = halves.times, halves.transposed_times
        coarse = halves.leading.gram_times
    found = subspace_iteration.filtered(
        lambda block: transposed_times(times(block)),
        subspace_iteration.gram_ritz(times, transposed_times, k, tolerance, each),
        _start_block(matrix, matrix.shape[-1], block_width(matrix, k)),
        k,
        lower=torch.zeros(matrix.shape[:-2], dtype=torch.float64),
        coarse=coarse,
    )
    if not found.converged or found.left is None:
        return None
    left = _completed(found.left[..., :k])
    return left, found.values[..., :k].sqrt().to(matrix), found.vectors[..., :k]


def _completed(left: Tensor) -> Tensor:
    """Left vectors ``(..., m, k)`` made orthonormal where a value is rounding, and its vector noise."""
    gram = left.mT @ left
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    # Small values' vectors have fewer digits than the matrix: a hundredth, or all the digits of a root.
    allowed = min(_NOISE, torch.finfo(left.dtype).eps ** 0.5 * 100)
    noisy = (gram - eye).abs().amax((-2, -1), keepdim=True) > allowed
    if not bool(noisy.any()):
        return left
    q, r = torch.linalg.qr(left)
    # Columns that were orthonormal stay as they were.
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    return torch.where(noisy, q * torch.where(signs == 0, 1.0, signs).unsqueeze(-2), left)
