"""Running sums of one layer, and of the inputs that several layers may share.

Half-precision operands are multiplied as they are, with float32 accumulation, where the device can;
sums are float32, or float64 where the operands are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorainit.linalg.block_triangle import FOLD_FROM, mirror, panels
from lorainit.linalg.dtypes import HALF, sum_dtype
from lorainit.types import GradientDtype, LayerStatistics, LossReduction

_ROUNDED_AT_ONCE = 2**20
"""Numbers of a product that is rounded to bfloat16."""


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left^T right`` for ``(n, a)`` and ``(n, b)``, in place once `total` is there."""
    dtype = sum_dtype(left.dtype)
    if left.dtype in HALF and left.is_cuda:
        if total is None:
            return torch.mm(left.mT, right, out_dtype=dtype)
        return torch.addmm(total, left.mT, right, out_dtype=dtype, out=total)
    left, right = left.to(dtype), right.to(dtype)
    if total is None:
        return left.mT @ right
    return total.addmm_(left.mT, right)


def add_rounded_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`add_product` with a sum in bfloat16: rounded once a call, as what an optimizer is given is."""
    if left.dtype == torch.bfloat16 and left.is_cuda:
        if total is None:
            return left.mT @ right
        return torch.addmm(total, left.mT, right, out=total)
    if total is None:
        total = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.bfloat16)
    wide = right.to(sum_dtype(right.dtype))
    # A few rows at a time: the whole product would be twice as large as the sum.
    step = max(1, _ROUNDED_AT_ONCE // max(1, right.shape[1]))
    for first in range(0, left.shape[1], step):
        own = slice(first, first + step)
        total[own] += left[:, own].to(wide.dtype).mT @ wide
    return total


def add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """``total + rows^T rows``; from `FOLD_FROM` on only the upper block triangle, see `mirror`."""
    width = rows.shape[-1]
    if width < FOLD_FROM:
        return add_product(total, rows, rows)
    dtype = sum_dtype(rows.dtype)
    if total is None:
        total = torch.zeros(width, width, dtype=dtype, device=rows.device)
    narrow = rows.dtype in HALF and rows.is_cuda
    rows = rows if narrow else rows.to(dtype)
    for low, high in panels(width):
        part, left, right = total[low:high, low:], rows[:, low:high].mT, rows[:, low:]
        if narrow:
            torch.addmm(part, left, right, out_dtype=dtype, out=part)
        else:
            part.addmm_(left, right)
    return total


def add_sum(total: Tensor | None, values: Tensor) -> Tensor:
    """``total`` plus the sum of the rows of ``(n, a)``."""
    new = values.sum(0, dtype=sum_dtype(values.dtype))
    return new if total is None else total.add_(new)


def add_squares(total: Tensor | None, values: Tensor) -> Tensor:
    """``total`` plus the sum of the squared rows of ``(n, a)``."""
    # A norm accumulates in the wider dtype without a wide copy of its operand.
    new = torch.linalg.vector_norm(values, dim=0, dtype=sum_dtype(values.dtype)).square_()
    return new if total is None else total.add_(new)


def add_lookup(
    total: Tensor | None, g: Tensor, words: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """``total`` plus every row of ``(n, out)`` in the column of its word, ``(out, count)``.

    Rows of a negative word are nobody's. A call is added up before it is rounded to `dtype`.
    """
    own = words >= 0
    seen, places = torch.unique(words[own], return_inverse=True)
    rows = g[own].to(sum_dtype(g.dtype))
    part = rows.new_zeros(len(seen), g.shape[1]).index_add_(0, places, rows)
    if total is None:
        total = g.new_zeros(g.shape[1], count, dtype=dtype)
    return total.index_add_(1, seen, part.mT.to(total.dtype))


def add_counts(total: Tensor | None, words: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``total`` plus how often each of `count` words occurs; negative ones are nobody's."""
    new = torch.bincount(words[words >= 0], minlength=count).to(dtype)
    return new if total is None else total.add_(new)


@dataclass(eq=False)
class InputSums:
    """Sums over the counted positions of one input, shared by all layers that read it."""

    second_moment: Tensor | None = None
    total: Tensor | None = None
    counts: Tensor | None = None
    positions: int = 0
    finished: bool = False

    def finish(self) -> None:
        """Make the second moment whole; once, however many layers share it."""
        if self.second_moment is not None and not self.finished:
            mirror(self.second_moment)
        self.finished = True

    def add_words(self, words: Tensor, count: int, dtype: torch.dtype) -> None:
        """Add ``(positions,)`` of `count` words."""
        self.positions += len(words)
        self.counts = add_counts(self.counts, words, count, sum_dtype(dtype))

    def add(self, x: Tensor, needs: frozenset[str]) -> None:
        """Add ``(positions, in)`` rows."""
        self.positions += x.shape[0]
        if "input_second_moment" in needs:
            self.second_moment = add_gram(self.second_moment, x)
        if "input_mean" in needs:
            self.total = add_sum(self.total, x)

    def clone(self) -> InputSums:
        """An independent copy, for a layer that stops sharing."""
        return InputSums(
            None if self.second_moment is None else self.second_moment.clone(),
            None if self.total is None else self.total.clone(),
            None if self.counts is None else self.counts.clone(),
            self.positions,
            self.finished,
        )


@dataclass(eq=False)
class LayerSums:
    """Sums of one layer; `inputs` may be another layer's too."""

    gradient: Tensor | None = None
    output_second_moment: Tensor | None = None
    output_squares: Tensor | None = None
    positions: int = 0
    calls: int = 0
    inputs: InputSums = field(default_factory=InputSums)

    def add_gradient(self, g: Tensor, x: Tensor, dtype: GradientDtype = "float32") -> None:
        """Add one call's ``sum_t g_t x_t^T`` from ``(all positions, out)`` and ``(.., in)``."""
        add = add_rounded_product if dtype == "bfloat16" else add_product
        self.gradient = add(self.gradient, g, x)

    def add_words(self, g: Tensor, words: Tensor, count: int, dtype: GradientDtype) -> None:
        """`add_gradient` of ``(all positions,)`` of `count` words."""
        place = torch.bfloat16 if dtype == "bfloat16" else sum_dtype(g.dtype)
        self.gradient = add_lookup(self.gradient, g, words, count, place)

    def add_output(self, g: Tensor, needs: frozenset[str]) -> None:
        """Add ``(counted positions, out)`` output gradients."""
        if "output_second_moment" in needs:
            self.output_second_moment = add_gram(self.output_second_moment, g)
        if "output_second_moment_diagonal" in needs:
            self.output_squares = add_squares(self.output_squares, g)

    def finish(
        self,
        *,
        sequences: float,
        label_tokens: float,
        loss_reduction: LossReduction,
        loss_scale: float,
        population: float | None,
    ) -> LayerStatistics:
        """The sums as statistics, whole, with the loss scale taken out; once."""
        self.inputs.finish()
        if self.output_second_moment is not None:
            mirror(self.output_second_moment)
        if loss_scale != 1.0:
            for tensor, power in (
                (self.gradient, 1),
                (self.output_second_moment, 2),
                (self.output_squares, 2),
            ):
                if tensor is not None:
                    tensor.div_(loss_scale**power)
        return LayerStatistics(
            gradient_sum=self.gradient,
            input_second_moment_sum=self.inputs.second_moment,
            input_sum=self.inputs.total,
            input_counts=self.inputs.counts,
            output_second_moment_sum=self.output_second_moment,
            output_second_moment_diagonal_sum=self.output_squares,
            sequences=sequences,
            label_tokens=label_tokens,
            positions=float(self.inputs.positions or self.positions),
            loss_reduction=loss_reduction,
            population=population,
        )
