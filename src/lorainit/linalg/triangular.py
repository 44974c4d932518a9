"""Cholesky factors ready for substitution: by blocks, so that nearly all of it is products.

A triangular solve with a thin right side waits for every row in turn; with the inverses of the blocks on
the diagonal known, it is one product for every block of rows, and reads the factor once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lorainit.linalg.split_precision import (
    LARGEST,
    accumulate,
    concatenate_columns,
    largest,
    multiply,
    narrowed,
    product_in_halves,
    split_columns,
    split_into,
)
from lorainit.types import Diagonal

_BLOCK = 2048
_BLOCK_CPU = 64
_LEAF = 64
_PANEL = 1024


class Triangle:
    """A stack of lower triangular ``L`` ``(..., n, n)``; what is expanded is held once.

    Attributes:
        lower: ``(batch, n, n)``.
        inverses: ``(batch, blocks, block, block)``, of the blocks on the diagonal.
        number: how many right sides belong to each matrix.
    """

    def __init__(self, lower: Tensor, block: int | None = None) -> None:
        if block is None:
            # A product costs a CPU nothing to begin with.
            block = _BLOCK if lower.is_cuda else _BLOCK_CPU
        self.lower, self.number = narrowed(lower)
        n = lower.shape[-1]
        self.edges = [*range(0, n, block), n]
        batch, blocks = len(self.lower), len(self.edges) - 1
        size = min(block, n)
        diagonal = torch.eye(size, dtype=lower.dtype, device=lower.device)
        diagonal = diagonal.repeat(batch, blocks, 1, 1)
        for index, (first, end) in enumerate(pairwise(self.edges)):
            width = end - first
            diagonal[:, index, :width, :width] = self.lower[:, first:end, first:end]
        self.inverses = lower_inverse(diagonal.flatten(0, 1)).reshape(diagonal.shape)

    def _inverse(self, index: int) -> Tensor:
        width = self.edges[index + 1] - self.edges[index]
        return self.inverses[:, index, :width, :width]

    def solve(self, right: Tensor) -> Tensor:
        """``L^-1 right`` for ``(..., n, width)``, in the factor's dtype."""
        rest = concatenate_columns(right, self.number)
        out = torch.empty_like(rest)
        for index, (first, end) in enumerate(pairwise(self.edges)):
            part = rest[:, first:end]
            if first:
                row = self.lower[:, first:end, :first]
                part = torch.baddbmm(part, row, out[:, :first], alpha=-1)
            out[:, first:end] = self._inverse(index) @ part
        return split_columns(out, right)

    def solve_transposed(self, right: Tensor) -> Tensor:
        """``L^-T right``."""
        rest = concatenate_columns(right, self.number)
        out = torch.empty_like(rest)
        n = self.edges[-1]
        for index, (first, end) in reversed(list(enumerate(pairwise(self.edges)))):
            part = rest[:, first:end]
            if end < n:
                column = self.lower[:, end:, first:end]
                part = torch.baddbmm(part, column.mT, out[:, end:], alpha=-1)
            out[:, first:end] = self._inverse(index).mT @ part
        return split_columns(out, right)

    def solve_quickly(self, right: Tensor) -> Tensor:
        """``L^-1 right`` for a wide right side ``(..., n, m)``, by products in halves; float32."""
        return split_columns(
            self._substitute(concatenate_columns(right, self.number).float()), right
        )

    def inverse_quickly(self) -> Tensor:
        """``L^-1`` ``(batch, n, n)``, by products in halves; float32."""
        return self._substitute(None)

    def _substitute(self, right: Tensor | None) -> Tensor:
        """`solve_quickly`; where `right` is the identity (None), without the zeros of its solution."""
        lower, n = self.lower, self.edges[-1]
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        # In units in which the largest entries on the diagonal are 1024, and the largest numbers of the
        # solution about 64: what is far from it loses no digits, and a thousand times as much is held.
        unit = diagonal.amax(-1)[:, None, None] / LARGEST
        size = (unit / diagonal.amin(-1)[:, None, None]).float() / 64
        if right is not None:
            size = size * largest(right, (-2, -1))
        columns = n if right is None else right.shape[-1]
        out = lower.new_empty(len(lower), n, columns, dtype=torch.float32)
        known = lower.new_empty(2, len(lower), n, columns, dtype=torch.float16)
        if right is None:
            out.zero_()
            known.zero_()
        for index, (first, end) in enumerate(pairwise(self.edges)):
            reach = end if right is None else columns
            if right is None:
                part = out.new_zeros(len(lower), end - first, reach)
                part[:, :, first:].diagonal(dim1=-2, dim2=-1).copy_(1 / size[:, 0])
            else:
                part = right[:, first:end] / size
            if first:
                # By columns, as the factor mostly is.
                row = lower.new_empty(2, len(lower), first, end - first, dtype=torch.float16).mT
                split_into(lower[:, first:end, :first], unit.reciprocal(), row[0], row[1])
                before = first if right is None else columns
                done, rest = known[:, :, :first, :before], part[..., :before]
                for left_digits, right_digits in ((0, 0), (0, 1), (1, 0)):
                    accumulate(rest, row[left_digits], done[right_digits], -1.0)
            solved = product_in_halves((self._inverse(index) * unit).float(), part)
            out[:, first:end, :reach] = solved
            one = torch.ones_like(size)
            split_into(solved, one, known[0, :, first:end, :reach], known[1, :, first:end, :reach])
        return out.mul_(size / unit.float())


class DiagonalTriangle:
    """A `Diagonal` as a `Triangle`."""

    def __init__(self, lower: Diagonal) -> None:
        self.values = lower.values.unsqueeze(-1)

    def solve(self, right: Tensor) -> Tensor:
        """``L^-1 right``."""
        return right.to(self.values.dtype) / self.values

    solve_transposed = solve

    def solve_quickly(self, right: Tensor) -> Tensor:
        """``L^-1 right`` in float32."""
        return (right / self.values).float()


def triangle_of(lower: Tensor) -> Triangle | DiagonalTriangle:
    """A factor ready for substitution, whichever form it has."""
    return DiagonalTriangle(lower) if isinstance(lower, Diagonal) else Triangle(lower)


def gram_of_lower(lower: Tensor) -> Tensor:
    """``P^T P`` ``(batch, n, n)`` of lower triangular float32 ``P``, written over it; by products in halves."""
    n = lower.shape[-1]
    scale = largest(lower, (-2, -1)) / LARGEST
    digits = lower.new_empty(2, *lower.shape, dtype=torch.float16)
    split_into(lower, scale.reciprocal(), digits[0], digits[1])
    # All of it is in the digits: no other matrix as large.
    out = lower
    for first in range(0, n, _PANEL):
        end = min(first + _PANEL, n)
        high, low = (d[:, first:, :end].mT for d in digits)
        panel = multiply(high, digits[0][:, first:, first:end])
        accumulate(panel, high, digits[1][:, first:, first:end])
        accumulate(panel, low, digits[0][:, first:, first:end])
        out[:, :end, first:end] = panel
        out[:, first:end, :first] = panel[:, :first].mT
    return out.mul_(scale.square())


def lower_inverse(lower: Tensor) -> Tensor:
    """Inverses of lower triangular ``(batch, n, n)``: leaves first, then pairs of them by products."""
    n = lower.shape[-1]
    halvings = max(0, (-(-n // _LEAF) - 1).bit_length())
    leaf = -(-n // 2**halvings)
    whole = leaf * 2**halvings
    if whole > n:
        grown = torch.eye(whole, dtype=lower.dtype, device=lower.device).repeat(len(lower), 1, 1)
        grown[:, :n, :n] = lower
        lower = grown
    eye = torch.eye(leaf, dtype=lower.dtype, device=lower.device)
    leaves = _on_diagonal(lower, leaf).flatten(0, 1)
    inner = torch.linalg.solve_triangular(leaves, eye.expand_as(leaves), upper=False)
    out = torch.zeros_like(lower)
    _on_diagonal(out, leaf).copy_(inner.reshape(len(lower), -1, leaf, leaf))
    size = leaf
    while size < whole:
        pairs, done = _on_diagonal(lower, 2 * size), _on_diagonal(out, 2 * size)
        corner = pairs[..., size:, :size] @ done[..., :size, :size]
        done[..., size:, :size] = -(done[..., size:, size:] @ corner)
        size *= 2
    return out[:, :n, :n]


def _on_diagonal(matrix: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal ``(batch, n / size, size, size)``, a view."""
    count = matrix.shape[-1] // size
    parts = matrix.reshape(len(matrix), count, size, count, size)
    return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
