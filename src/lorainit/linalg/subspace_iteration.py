"""Leading eigenpairs by Chebyshev-filtered subspace iteration; batched.

A block of a few vectors is multiplied by a polynomial of the matrix that is small on the part of the
spectrum that is not wanted and grows quickly beyond it (Zhou, Saad, Tiago, Chelikowsky, Journal of
Computational Physics 219, 2006). All work is products of the matrix with the block, which devices do
well, and decompositions as small as the block is wide. Pairs that have converged are locked: the
filter works on what is orthogonal to them, so that far larger neighbours do not drown the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]
"""What a symmetric ``(..., n, n)`` matrix does to a block ``(..., n, width)``."""

OVERSAMPLING = 16
"""Columns of a block beyond the pairs sought: the wider, the lower the polynomial."""

BATCHED_ON_CUDA = 32
"""Up to this width a CUDA device decomposes a stack of small matrices at once."""

_MAX_PRODUCTS = 400
_MAX_DEGREE = 48
_LOCK = 0.3
_LEAST_GAP = 4e-3
_PATIENCE = 3
_PROGRESS = 0.7
_NEAR = 10.0
"""Times what is allowed: from there on a round is multiplied by all digits, and mostly the last."""

_INDEPENDENT = 0.5
"""A Cholesky factor's least diagonal entry over its largest, above which a round leaves rounding alone."""


@dataclass(frozen=True, eq=False)
class Ritz:
    """What a block knows of the matrix.

    Attributes:
        values: ``(..., width)``, approximate eigenvalues, descending; float64 where there is one.
        vectors: ``(..., n, width)``, orthonormal.
        error: ``(..., k)``, residual norms of the first ``k`` pairs over what is allowed.
        left: ``(..., m, width)``, left singular vectors, where the matrix is a Gram matrix.
    """

    values: Tensor
    vectors: Tensor
    error: Tensor
    left: Tensor | None = None

    @property
    def converged(self) -> bool:
        """Whether all pairs sought meet their tolerance; waits for the device."""
        return bool((self.error <= 1).all())

    def on_host(self) -> tuple[Tensor, Tensor]:
        """Values and errors, for which the device is waited for once; in the values' dtype."""
        both = torch.cat([self.values, self.error.to(self.values)], -1).cpu()
        return both[..., : self.values.shape[-1]], both[..., self.values.shape[-1] :]


@dataclass(frozen=True, eq=False)
class Stage:
    """One way to multiply by the matrix: as long as it brings a block nearer.

    Attributes:
        apply: the matrix.
        ritz: measures a block; rough stages measure themselves, the last one the matrix itself.
        dtype: of the block.
        hasty: whether it ends at the first round that brings nothing: a better one follows.
        coarse: see `filtered`.
    """

    apply: Apply
    ritz: Callable[[Tensor], Ritz]
    dtype: torch.dtype
    hasty: bool = False
    coarse: Apply | None = None


def in_stages(
    stages: Sequence[Stage], start: Tensor, k: int, *, lower: Tensor, settled: bool = False
) -> Ritz | None:
    """`filtered`, each stage from where the one before it came to; what the last one finds.

    None where numbers grew beyond what it holds. A rough stage that they outgrow is left out.
    """
    block, found = start, None
    for stage in stages:
        try:
            found = filtered(
                stage.apply,
                stage.ritz,
                block.to(stage.dtype),
                k,
                lower=lower,
                settled=settled,
                patience=1 if stage.hasty else _PATIENCE,
                coarse=stage.coarse,
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            found = None
            continue
        block, settled = found.vectors, True
    return found


def filtered(
    apply: Apply,
    ritz: Callable[[Tensor], Ritz],
    start: Tensor,
    k: int,
    *,
    lower: Tensor,
    settled: bool = False,
    patience: int = _PATIENCE,
    coarse: Apply | None = None,
) -> Ritz:
    """Iterate until the ``k`` leading pairs meet their tolerance (`Ritz.converged`), or none gets nearer.

    Args:
        apply: the matrix; it may be rougher, in a narrower dtype, than what `ritz` measures with.
        ritz: pairs from an orthonormal block, in the block's dtype, with their errors.
        start: ``(..., n, width)``, any block of full rank, ``width > k``.
        k: how many pairs are wanted, those with the largest eigenvalues.
        lower: ``(...)``, a number that no eigenvalue is below.
        settled: `start` has been iterated on already: it is measured as it is.
        patience: how many rounds without progress end the iteration.
        coarse: the matrix once more, with fewer digits than `apply` and quicker: what the rounds are multiplied
            by until the block is near, or gets no nearer.
    """
    times = apply if coarse is None else coarse
    begin = orthonormal(start)
    found = ritz(begin if settled else orthonormal(times(begin)))
    budget, left, best = _MAX_PRODUCTS, patience, float("inf")
    lower = lower.cpu()
    while left:
        values, error = found.on_host()
        worst = float(error.max())
        if not worst > 1:
            # Met, or not a number: then the stack is left to a dense solver.
            break
        stalls = not worst <= _PROGRESS * best
        if times is not apply and (stalls or worst < _NEAR):
            times, left = apply, patience
        else:
            left = left - 1 if stalls else patience
        best = min(best, worst)
        filter_ = _Filter(values, error, lower.to(values), found.vectors.dtype)
        budget -= filter_.highest + 2
        if budget < 0:
            break
        try:
            found = ritz(filter_(times, found.vectors))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # Not finite: an eigenvalue below the bound has outgrown everything.
            break
    return found


class _Filter:
    """A Chebyshev polynomial for every matrix, small on ``[lower, edge]``, ``edge`` the least Ritz value.

    Args:
        values: ``(..., width)`` of a `Ritz`, on the host, as all small numbers: a device is slower.
        error: ``(..., k)``, likewise.
        lower: ``(...)``, likewise.
        dtype: of the block.
    """

    def __init__(self, values: Tensor, error: Tensor, lower: Tensor, dtype: torch.dtype) -> None:
        k = error.shape[-1]
        locked = (error <= _LOCK).cumprod(-1)
        # Below the pairs sought, also where more eigenvalues are equal than the block has columns.
        sought = values[..., k - 1]
        edge = torch.minimum(values[..., -1], sought - _LEAST_GAP * (sought - lower))
        # Where the matrix has less rank than the block has columns the edge is rounding, and the
        # growth beyond it would overflow.
        room = 8 * torch.finfo(dtype).eps * (values[..., 0] - lower)
        edge = torch.maximum(edge, lower + room)
        centre = (edge + lower) / 2
        half = ((edge - lower) / 2).clamp_min(torch.finfo(dtype).tiny ** 0.5)

        def growth(value: Tensor) -> Tensor:
            """Logarithm of what each degree multiplies this eigenvalue's vector by."""
            place = (value - centre) / half
            return torch.acosh(place.clamp_min(1 + 1e-12))

        first = locked.sum(-1).clamp_max(k - 1)
        largest = growth(values.gather(-1, first.unsqueeze(-1)).squeeze(-1))
        smallest = growth(sought)
        # What brings the worst pair to its tolerance, and what leaves the smallest pair sought above
        # the rounding of the largest.
        needed = ((error.amax(-1).log() + 2) / smallest.clamp_min(1e-3)).ceil()
        digits = -0.75 * math.log(torch.finfo(dtype).eps)
        possible = (digits / (largest - smallest).clamp_min(1e-6)).floor()
        degrees = torch.minimum(needed, possible).clamp(2, _MAX_DEGREE)
        self.highest, self.least = int(degrees.max()), int(degrees.min())
        self.some = bool(locked.any())
        self.locked = (
            torch.nn.functional.pad(locked, (0, values.shape[-1] - k)).bool().unsqueeze(-2)
        )
        self.numbers = torch.stack([centre, 1 / half, degrees])[..., None, None]

    def __call__(self, apply: Apply, vectors: Tensor) -> Tensor:
        """The block, locked vectors as they are, the others filtered; orthonormal."""
        centre, scale, degrees = self.numbers.to(vectors)
        locked = self.locked.to(vectors.device) if self.some else None
        kept = vectors if locked is None else vectors * locked
        before = vectors - kept if self.some else vectors

        def outside(block: Tensor) -> Tensor:
            return block - kept @ (kept.mT @ block) if self.some else block

        now = outside(torch.addcmul(apply(before) * scale, before, centre * scale, value=-1))
        for degree in range(2, self.highest + 1):
            image = torch.addcmul(apply(now) * (2 * scale), now, centre * scale, value=-2)
            after = outside(image) - before
            if degree <= self.least:
                before, now = now, after
                continue
            # Matrices of one stack need different degrees: who is done waits.
            goes_on = degree <= degrees
            before, now = torch.where(goes_on, now, before), torch.where(goes_on, after, now)
        tiny = torch.finfo(now.dtype).tiny
        length = torch.linalg.vector_norm(now, dim=-2, keepdim=True).clamp_min(tiny)
        now = now / length
        return orthonormal(now if locked is None else torch.where(locked, vectors, now))


def orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis ``(..., n, k)`` of a block's columns, by rounds of Cholesky.

    The first columns span what they spanned. The first round is slightly shifted, so that it leaves
    a block whose condition the next can bear; a third one mends what rounding was left of columns
    that depended on one another.
    """
    out: Tensor = block
    for attempt in range(3):
        wide = _wide(out)
        gram = wide.mT @ wide
        if attempt == 0:
            limits = torch.finfo(gram.dtype)
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(1e3 * limits.eps * diagonal.mean(-1, keepdim=True) + limits.tiny)
        triangle, info = torch.linalg.cholesky_ex(gram)
        independence = _independence(triangle, info)
        if not independence > 0:
            basis: Tensor = torch.linalg.qr(block).Q
            return basis
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
        inverse = torch.linalg.solve_triangular(triangle, eye, upper=False)
        out = (wide @ inverse.mT).to(block)
        if attempt and independence > _INDEPENDENT:
            break
    return out


def _independence(triangle: Tensor, info: Tensor) -> float:
    """The least diagonal entry of a stack of Cholesky factors over its largest; 0 where one failed or is 0."""
    sizes = triangle.diagonal(dim1=-2, dim2=-1)
    # The device is waited for once.
    told = torch.cat([sizes, info.unsqueeze(-1).to(sizes)], -1).cpu()
    sizes, failed = told[..., :-1], told[..., -1]
    # A block of zeros has no more than what the shift gave it.
    failed = (failed != 0) | (sizes.amax(-1) ** 2 <= 2 * torch.finfo(sizes.dtype).tiny)
    return 0.0 if bool(failed.any()) else float((sizes.amin(-1) / sizes.amax(-1)).min())


def symmetric_ritz(
    apply: Apply, k: int, allowed: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Ritz]:
    """Pairs of a symmetric matrix; `allowed` gives residual norms from the values ``(..., k)``."""

    def ritz(block: Tensor) -> Ritz:
        image = apply(block)
        product = _wide(block).mT @ _wide(image)
        values, turn = _eigh((product + product.mT) / 2)
        values, turn = values.flip(-1), turn.flip(-1).to(block)
        vectors = block @ turn
        rest = image @ turn[..., :k] - vectors[..., :k] * values[..., None, :k].to(block)
        norms = torch.linalg.vector_norm(rest, dim=-2)
        return Ritz(values, vectors, norms / allowed(values[..., :k]).to(norms))

    return ritz


def gram_ritz(
    times: Apply, transposed_times: Apply, k: int, tolerance: float, each: float = 0.0
) -> Callable[[Tensor], Ritz]:
    """Pairs of ``M^T M``; the error is ``|M^T u - s v|`` over what is allowed.

    That is ``tolerance`` times the largest singular value, or ``each`` times the pair's own.

    Args:
        times: what ``M`` ``(..., m, n)`` does to a block.
        transposed_times: what ``M^T`` does.
        k: how many pairs are wanted.
        tolerance: see above.
        each: see above.
    """

    def ritz(block: Tensor) -> Ritz:
        image = _wide(times(block))
        values, turn = _eigh(image.mT @ image)
        values, turn = values.flip(-1).clamp_min(0), turn.flip(-1)
        sizes = values.sqrt().clamp_min(torch.finfo(block.dtype).tiny)
        left = (image @ turn / sizes.unsqueeze(-2)).to(block)
        vectors = (_wide(block) @ turn).to(block)
        rest = transposed_times(left[..., :k]) - vectors[..., :k] * sizes[..., None, :k].to(block)
        norms = torch.linalg.vector_norm(rest, dim=-2)
        allowed = torch.maximum(tolerance * sizes[..., :1], each * sizes[..., :k])
        return Ritz(values, vectors, norms / allowed.to(norms), left)

    return ritz


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of matrices as small as a block; a CUDA device does larger ones one by one, and slower than its host."""
    if matrix.is_cuda and matrix.shape[-1] > BATCHED_ON_CUDA:
        values, vectors = torch.linalg.eigh(matrix.cpu())
        return values.to(matrix.device), vectors.to(matrix.device)
    pair: tuple[Tensor, Tensor] = torch.linalg.eigh(matrix)
    return pair


def _wide(block: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return block if block.device.type == "mps" else block.double()
