"""Damped inverses and roots, extreme eigenvectors, leading singular triplets; batched.

Everything takes leading batch dimensions and works in the dtype it is given: pass float64 for exact
results, float32 for quick ones. Precision and failure rules, for every function here:

* input that is not finite is an error, never a result;
* a factorization that fails in float32 is tried once more in float64 (on the CPU where the device
  has none), and is an error if it fails there too;
* an iteration runs until its *residual* meets the tolerance; where it does not get there, a dense
  solver finishes the work;
* signs and starting blocks are fixed, so the same input gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorainit import subspace
from lorainit.errors import FactorizationError, NonFiniteError, RankError
from lorainit.halves import Halves
from lorainit.types import DampingMode

DENSE_LIMIT = 768
"""Up to this size a dense eigen- or singular value decomposition is as quick as iterating (CPU)."""

DENSE_LIMIT_CUDA = 128
"""The same on CUDA, where small dense decompositions wait for one another."""

_SYMMETRIC_LIMIT = 256
"""The same of leading eigenvectors, whose iteration needs one product a step, not two."""

_LOOP_FROM = 256

_BOUND_PRODUCTS = 4
_BOUND_MARGIN = 1.05

_HASTE = 0.7
"""Of what is allowed: where a rough stage ends, so that the last one has only to measure."""


# --- dtypes and checks ----------------------------------------------------------------------


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: half precision is never solved in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_finite(tensor: Tensor) -> Tensor:
    """Whether every value is finite, as a 0-dim tensor: one read, no copy."""
    if tensor.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    # The largest absolute value carries NaN and infinity along.
    return torch.isfinite(torch.linalg.vector_norm(tensor, ord=torch.inf))


def check_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself, or `NonFiniteError` naming `what`."""
    if not bool(all_finite(tensor)):
        raise NonFiniteError(
            f"{what} has values that are not finite. Look at the data and the model's dtype: "
            "float16 overflows where bfloat16 and float32 do not."
        )
    return tensor


def gram(matrix: Tensor) -> Tensor:
    """``M^T M``; of half precision on CUDA by the matrix units, exact products summed in float32."""
    if matrix.is_cuda and matrix.dtype in (torch.float16, torch.bfloat16):
        stack = matrix.flatten(0, -3) if matrix.dim() > 2 else matrix.unsqueeze(0)
        product = torch.stack([torch.mm(m.mT, m, out_dtype=torch.float32) for m in stack])
        return product.reshape(*matrix.shape[:-2], *product.shape[-2:])
    wide = matrix.to(compute_dtype(matrix))
    return wide.mT @ wide


def check_rank(rank: int, rows: int, columns: int, *, factor: int = 1) -> None:
    """Raise `RankError` unless ``1 <= factor * rank <= min(rows, columns)``."""
    if rank < 1 or factor * rank > min(rows, columns):
        wanted = f"{factor} x rank = {factor * rank}" if factor > 1 else f"rank {rank}"
        raise RankError(
            f"{wanted} is not between 1 and min(out, in) = {min(rows, columns)} of a "
            f"({rows}, {columns}) weight. Lower the rank (rank_pattern does it for single layers), "
            "or pass cap_rank=True."
        )


def double_precision(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no float64 (MPS)."""
    return once(lambda t: t.cpu().double() if t.device.type == "mps" else t.double(), tensor)


def dense_limit(like: Tensor) -> int:
    """Up to which size a dense decomposition is as quick as iterating, on this tensor's device."""
    return DENSE_LIMIT_CUDA if like.is_cuda else DENSE_LIMIT


def has_matrix_units(like: Tensor) -> bool:
    """Whether this tensor's device multiplies half precision far more quickly than float32."""
    return like.is_cuda


def on_matrix_units(matrix: Tensor) -> bool:
    """Whether large products with this matrix are quickest in `Halves`."""
    return matrix.dtype == torch.float32 and has_matrix_units(matrix)


def block_width(like: Tensor, k: int) -> int:
    """Columns of an iteration's block: on CUDA as many as come at no cost, in whole eights."""
    width = k + subspace.OVERSAMPLING
    return max(subspace.BATCHED_ON_CUDA, -(-width // 8) * 8) if like.is_cuda else width


def iterates(like: Tensor) -> bool:
    """Whether ``(..., n, m)`` is large enough for operators that are never formed."""
    return like.shape[-2] > dense_limit(like)


# --- what layers that share an input share -----------------------------------------------------


def once(work: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """`work` on a stack of matrices ``(..., m, n)``, once for those along an expanded dimension.

    Args:
        work: gives a tensor with the same leading dimensions.
        stack: what `LayerStatistics.stack` expanded has stride zero there.
    """
    narrow = stack
    for dim in range(stack.dim() - 2):
        if stack.stride(dim) == 0 and stack.shape[dim] > 1:
            narrow = narrow.narrow(dim, 0, 1)
    if narrow is stack:
        return work(stack)
    found = work(narrow)
    leading = stack.dim() - 2
    return found.expand(*stack.shape[:-2], *found.shape[leading:])


def product(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrix @ block``; one matrix times several blocks, where it is expanded over them."""
    if not (matrix.dim() == 4 and matrix.stride(1) == 0 and matrix.shape[1] > 1):
        return matrix @ block
    groups, number, rows, width = block.shape
    beside = block.transpose(1, 2).reshape(groups, rows, number * width)
    found = matrix[:, 0] @ beside
    return found.reshape(groups, -1, number, width).transpose(1, 2)


# --- one by one where that is quicker -------------------------------------------------------


def _one_by_one(matrix: Tensor) -> bool:
    """CUDA's batched factorizations are made for small matrices: large ones go one by one."""
    return matrix.is_cuda and matrix.dim() > 2 and matrix.shape[-1] >= _LOOP_FROM


def _cholesky(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``matrix + damping * I`` in the damping's dtype; a large stack one by one, and copied once."""
    out = torch.empty(matrix.shape, dtype=damping.dtype, device=matrix.device).copy_(matrix)
    out.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    if not _one_by_one(out):
        factor, info = torch.linalg.cholesky_ex(out)
        return factor, info
    infos = []
    for one in out.flatten(0, -3):
        factor, info = torch.linalg.cholesky_ex(one)
        one.copy_(factor)
        infos.append(info)
    return out, torch.stack(infos)


def solve_triangular(triangle: Tensor, right: Tensor, *, upper: bool, left: bool = True) -> Tensor:
    """``torch.linalg.solve_triangular``, large matrices of a stack one by one on CUDA."""
    if not (_one_by_one(triangle) and triangle.shape[:-2] == right.shape[:-2]):
        whole: Tensor = torch.linalg.solve_triangular(triangle, right, upper=upper, left=left)
        return whole
    pairs = zip(triangle.flatten(0, -3), right.flatten(0, -3), strict=True)
    solved = [torch.linalg.solve_triangular(t, r, upper=upper, left=left) for t, r in pairs]
    return torch.stack(solved).reshape(right.shape)


# --- damping and roots ----------------------------------------------------------------------


def damping_value(diagonal: Tensor, damping: float, mode: DampingMode) -> Tensor:
    """The ``lambda`` that is added to a factor's diagonal (METHODS.md, Damping).

    Args:
        diagonal: ``(..., n)``, the factor's own diagonal.
        damping: the setting.
        mode: ``"relative"``: ``damping`` times the diagonal's mean; ``"absolute"``: ``damping``.

    Returns:
        ``(...)``. In relative mode never zero, so that a factor without any signal stays
        invertible.
    """
    if mode == "absolute":
        return torch.full_like(diagonal[..., 0], damping)
    floor = torch.finfo(diagonal.dtype).tiny / torch.finfo(diagonal.dtype).eps
    return (damping * diagonal.mean(-1)).clamp_min(floor)


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
    for attempt in (damping, double_precision(damping)):
        factor, info = _cholesky(matrix.to(attempt.device), attempt)
        # What is not finite anywhere in a row is not finite on the diagonal either.
        if not bool(info.any()) and bool(all_finite(factor.diagonal(dim1=-2, dim2=-1))):
            return factor
    raise FactorizationError(
        f"{what} is not positive definite with damping {float(damping.min()):.3g} added, in "
        "float64 either: the sample spans fewer directions than the layer has, and rounding in "
        "the collected sums exceeds that damping. Use damping_mode='relative' (the default), "
        "raise damping, or collect statistics from more tokens."
    )


def damped_eigh(matrix: Tensor, damping: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``matrix + damping * I``, none below ``damping``, and eigenvectors.

    Negative eigenvalues of a second moment are rounding; they count as zero.

    Returns:
        ``(..., n)`` ascending and ``(..., n, n)`` with eigenvectors as columns.
    """
    check_finite(matrix, what)
    values, vectors = eigh(matrix)
    return values.clamp_min(0) + damping.unsqueeze(-1), vectors


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, again in float64 where float32 does not converge."""
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
        return _lapack_svd(matrix)
    return _gram_svd(matrix, min(matrix.shape[-2:]))


def _lapack_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _gram_svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``k`` triplets of a float32 matrix by way of the smaller Gram matrix, in float64.

    The QR decomposition in place of a division by singular values keeps the second set of vectors
    orthonormal where singular values vanish.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    work = double_precision(matrix if wide else matrix.mT)
    near = eigh(work @ work.mT)[1][..., -k:].flip(-1)
    far, triangle = torch.linalg.qr(work.mT @ near)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    far = far * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    u, v = (near, far) if wide else (far, near)
    return u.to(matrix), diagonal.abs().to(matrix), v.to(matrix)


# --- leading and trailing subspaces ---------------------------------------------------------


def smallest_of_operator(
    apply: subspace.Apply,
    like: Tensor,
    k: int,
    *,
    upper: Tensor,
    tolerance: float | None = None,
    each: float = 0.0,
    rough: subspace.Apply | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Orthonormal eigenvectors of the ``k`` smallest eigenvalues of a matrix that is never formed.

    By filtered subspace iteration (`lorainit.subspace`), until every residual ``|M v - mu v|`` is
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
        start: ``(..., n, width)`` near the vectors sought, where such are known.

    Returns:
        Eigenvalues ``(..., k)`` ascending, eigenvectors ``(..., n, k)``, and all that was iterated on,
        ``(..., n, width)``; None where a dense solver is as quick, or where the iteration does not meet
        its tolerance: form the matrix.
    """
    n = like.shape[-2]
    width = block_width(like, k) if start is None else start.shape[-1]
    if n <= dense_limit(like) or 2 * width >= n:
        return None
    goal = _tolerance(like, tolerance)

    def stage(times: subspace.Apply, dtype: torch.dtype, share: float) -> subspace.Stage:
        def negative(block: Tensor) -> Tensor:
            return -times(block)

        def allowed(values: Tensor) -> Tensor:
            sizes = values.abs()
            largest = sizes.amax(-1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
            wanted = share * torch.maximum(goal * largest, each * sizes)
            # No residual can be asked to be below the rounding of the matrix itself.
            rounding = 8 * torch.finfo(dtype).eps * upper.abs().unsqueeze(-1).to(values)
            return torch.maximum(wanted, rounding)

        ritz = subspace.symmetric_ritz(negative, k, allowed)
        return subspace.Stage(negative, ritz, dtype, hasty=share < 1)

    stages = [stage(apply, like.dtype, 1.0)]
    if rough is not None:
        stages.insert(0, stage(rough, torch.float32, _HASTE))
    block = _start_block(like, n, width) if start is None else start
    found = subspace.in_stages(stages, block, k, lower=-upper, settled=start is not None)
    if found is None or not found.converged:
        return None
    return -found.values[..., :k], fix_signs(found.vectors[..., :k]), found.vectors


def bound_of_operator(apply: subspace.Apply, like: Tensor) -> Tensor:
    """``(...)``: a number that hardly any eigenvalue of a positive definite matrix is above.

    After a few products with a random block the largest Ritz value and its residual; the true largest
    eigenvalue is within a few percent. An iteration is only slower where it is not, see
    `smallest_of_operator`.

    Args:
        apply: what the matrix does to a block.
        like: any ``(..., n, m)`` tensor of the matrix's batch, size, dtype and device.
    """
    n = like.shape[-2]
    block = subspace.orthonormal(_start_block(like, n, min(n, subspace.OVERSAMPLING)))
    for _ in range(_BOUND_PRODUCTS):
        block = subspace.orthonormal(apply(block))
    found = subspace.symmetric_ritz(apply, 1, lambda values: values)(block)
    return found.values[..., 0] * (1 + found.error[..., 0]) * _BOUND_MARGIN


def largest_eigenvectors(
    matrix: Tensor, k: int, *, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors of the ``k`` largest eigenvalues of a positive semidefinite matrix.

    Dense where it is small, above that by filtered subspace iteration until every residual
    ``|M v - mu v|`` is below ``tolerance`` times the largest eigenvalue, or dense if it never is.

    Returns:
        Eigenvalues ``(..., k)`` descending, eigenvectors ``(..., n, k)``.
    """
    if matrix.dim() == 4 and matrix.stride(1) == 0 and matrix.shape[1] > 1:
        # Layers that share an input.
        found = largest_eigenvectors(matrix[:, 0], k, tolerance=tolerance)
        values, vectors = (t.unsqueeze(1).expand(-1, matrix.shape[1], *t.shape[1:]) for t in found)
        return values, vectors
    n = matrix.shape[-1]
    width = block_width(matrix, k)
    if n > min(dense_limit(matrix), _SYMMETRIC_LIMIT) and 4 * width < n:
        tiny = torch.finfo(matrix.dtype).tiny

        goal = _tolerance(matrix, tolerance)
        times = Halves.of(matrix).times if on_matrix_units(matrix) else matrix.matmul
        ritz = subspace.symmetric_ritz(
            matrix.matmul, k, lambda v: (goal * v[..., :1]).clamp_min(tiny)
        )
        zero = torch.zeros(matrix.shape[:-2], dtype=torch.float64, device=matrix.device)
        pairs = subspace.filtered(times, ritz, _start_block(matrix, n, width), k, lower=zero)
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
        ritz = subspace.symmetric_ritz(matrix.matmul, 1, lambda v: (1e-6 * v).clamp_min(tiny))
        zero = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
        found = subspace.filtered(matrix.matmul, ritz, near, 1, lower=zero)
        if found.converged:
            # A value's error is the square of its vector's.
            return found.values[..., 0].clamp_min(0)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values[..., -1].clamp_min(0)


def top_singular(
    matrix: Tensor, k: int, *, tolerance: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``k`` singular triplets ``(U, S, V)`` of ``(..., m, n)``, signs fixed.

    Dense up to `dense_limit` (in the smaller dimension). Above it by filtered subspace iteration
    (`lorainit.subspace`), until every residual ``|M^T u - s v|`` is below ``tolerance * S[0]``; a
    dense SVD finishes what does not converge.

    Returns:
        ``(..., m, k)``, ``(..., k)`` descending, ``(..., n, k)``.
    """
    small = min(matrix.shape[-2:])
    if small > dense_limit(matrix) and 2 * block_width(matrix, k) < small:
        found = _filtered_svd(matrix, k, _tolerance(matrix, tolerance))
        if found is not None:
            return _fix_pair_signs(*found)
    if matrix.dtype == torch.float64:
        u, s, v = _lapack_svd(matrix)
        return _fix_pair_signs(u[..., :k], s[..., :k], v[..., :k])
    return _fix_pair_signs(*_gram_svd(matrix, k))


def bottom_singular(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Last ``k`` of the ``min(m, n)`` singular triplets of ``(..., m, n)``, signs fixed; dense.

    Returns:
        ``(..., m, k)``, ``(..., k)`` descending, ``(..., n, k)``.
    """
    u, s, v = svd(matrix)
    return _fix_pair_signs(u[..., -k:], s[..., -k:], v[..., -k:])


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
    signs = _column_signs(columns)
    return (columns * signs).mT, content @ (rotation * signs)


def largest_singular_value(matrix: Tensor) -> Tensor:
    """``(...)``: the spectral norm of ``(..., m, n)``, to the tolerance of `top_singular`."""
    m, n = matrix.shape[-2:]
    if min(m, n) <= dense_limit(matrix):
        gram = matrix @ matrix.mT if m <= n else matrix.mT @ matrix
        values: Tensor = torch.linalg.eigvalsh(gram)
        return values[..., -1].clamp_min(0).sqrt()
    return top_singular(matrix, 1)[1][..., 0]


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns of ``(..., n, k)`` with their entry of largest absolute value made positive."""
    return vectors * _column_signs(vectors)


def fix_pair_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Paired columns with the signs of ``v`` fixed as in `fix_signs`, and those of ``u`` with them."""
    signs = _column_signs(v)
    return u * signs, v * signs


def _fix_pair_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signs = _column_signs(v)
    return u * signs, s, v * signs


def _column_signs(vectors: Tensor) -> Tensor:
    index = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = vectors.gather(-2, index).sign()
    return torch.where(signs == 0, torch.ones_like(signs), signs)


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


def _filtered_svd(matrix: Tensor, k: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets by filtered subspace iteration on ``M^T M``; None without convergence."""
    halves = Halves.of(matrix) if on_matrix_units(matrix) else None

    def apply(block: Tensor) -> Tensor:
        if halves is None:
            return matrix.mT @ (matrix @ block)
        return halves.transposed_times(halves.times(block))

    ritz = subspace.gram_ritz(matrix, k, tolerance)
    start = _start_block(matrix, matrix.shape[-1], block_width(matrix, k))
    zero = torch.zeros(matrix.shape[:-2], dtype=torch.float64)
    found = subspace.filtered(apply, ritz, start, k, lower=zero)
    if not found.converged or found.left is None:
        return None
    return found.left[..., :k], found.values[..., :k].sqrt().to(matrix), found.vectors[..., :k]
