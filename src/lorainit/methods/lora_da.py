"""LoRA-DA: the input subspace with the least expected distance to the target weight.

Zhang et al., "LoRA-DA: Data-Aware Initialization for Low-Rank Adaptation via Asymptotic Analysis",
ICML 2026, arXiv 2510.24561. Checked against the authors' release (github zqy0126/LoRA-DA, commit
928f484) through tensors that it made, in ``tests/data/golden``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.linalg.split_precision import SplitMatrix, concatenate_columns, split_columns
from lorainit.linalg.triangular import Triangle, gram_of_lower, lower_inverse, triangle_of
from lorainit.methods import _lora_da_options as options
from lorainit.methods._settings import (
    ROW_NORM,
    TRUST_REGION,
    require_choice,
    require_damping,
    require_number,
    require_types,
)
from lorainit.types import DampingMode, Factors, LayerStatistics

_Operator = Callable[[Tensor], Tensor]

EACH = 1e-3
"""In float32 an eigenvector has converged when its residual is below this times its own eigenvalue
(docs/performance.md)."""


@dataclass(frozen=True, eq=False)
class _Fisher:
    """What both ways to solve begin with, in float64 but for the gradient.

    Attributes:
        z_factor: ``(..., in, in)``, lower Cholesky factor of ``Z``.
        gradient: ``(..., out, in)``, ``G``, as it was collected.
        y_inverse: ``(..., out)``, ``1/y``.
        variance: ``(...)``, ``beta * sum(1/y) / N``.
        inverse_bound: ``(...)``, at least the norm of ``Z^-1``.
    """

    z_factor: Tensor
    gradient: Tensor
    y_inverse: Tensor
    variance: Tensor
    inverse_bound: Tensor

    def scaled(self, length: Tensor | None = None) -> Tensor:
        """``H = diag(1/y) G``, ``(..., out, in)``, over a length ``(...)``."""
        by_row = self.y_inverse if length is None else self.y_inverse / length.unsqueeze(-1)
        return self.gradient * by_row.unsqueeze(-1)

    def change(self) -> Tensor:
        """``D`` before it is divided by ``sigma``, ``(..., in, out)``."""
        found: Tensor = -torch.cholesky_solve(self.scaled().mT, self.z_factor)
        return found

    def length(self) -> Tensor:
        """The Frobenius norm of ``H``, ``(...)``, one where it is zero; ``H`` is not formed."""
        rows = torch.linalg.vector_norm(self.gradient, dim=-1, dtype=self.y_inverse.dtype)
        norm: Tensor = torch.linalg.vector_norm(rows * self.y_inverse, dim=-1)
        return torch.where(norm > 0, norm, torch.ones_like(norm))


class _Products(NamedTuple):
    """What an iteration multiplies by, in some arithmetic.

    Attributes:
        inverse: ``Z^-1``, in units of its bound.
        times: ``H``, in units of its norm.
        transposed_times: ``H^T``.
        ratio: ``(..., 1, 1)``, the variance term's weight in these units.
    """

    inverse: _Operator
    times: _Operator
    transposed_times: _Operator
    ratio: Tensor

    def missed(self, block: Tensor) -> Tensor:
        """``-D D^T``."""
        return -self.inverse(self.transposed_times(self.times(self.inverse(block))))

    def omega(self, block: Tensor) -> Tensor:
        """``ratio Z^-1 - D D^T``."""
        middle = self.inverse(block)
        return self.ratio * middle - self.inverse(self.transposed_times(self.times(middle)))


def _with_fewer_digits(
    triangle: Triangle, unit: Tensor, h: Tensor, ratio: Tensor
) -> tuple[_Products, _Products | None]:
    """Products in float32, or nearly so on matrix units; there also with the leading digits alone.

    ``Z^-1`` is rounded, never ``Z``: rounding of its large entries is small beside its large
    eigenvalues, which are what is looked for, where rounding of ``Z`` would exceed the damping.
    """
    weight, narrow = ratio[..., None, None].float(), unit.reshape(len(triangle.lower), -1)[:, 0]
    scale = narrow.rsqrt()[:, None, None]
    if linalg.has_matrix_units(h):
        z = SplitMatrix.of(gram_of_lower(triangle.inverse_quickly().mul_(scale.float())))
        z, halves = z._replace(number=triangle.number), SplitMatrix.of(h)
        both, leading = (
            _Products(inverse.times, change.times, change.transposed_times, weight)
            for inverse, change in ((z, halves), (z.leading, halves.leading))
        )
        return both, leading
    root, low = (lower_inverse(triangle.lower) * scale).float(), h.float()

    def inverse(block: Tensor) -> Tensor:
        return split_columns(root.mT @ (root @ concatenate_columns(block, triangle.number)), block)

    return _Products(inverse, low.matmul, low.mT.matmul, weight), None


@dataclass(frozen=True)
class LoraDA:
    r"""Smallest eigenvectors of a bias-plus-variance matrix; the model starts displaced by them.

    With the Kronecker Fisher ``Z (x) Y`` of the target data, ``Z = Sx + lambda I`` and
    ``y = diag(Sy) + lambda_y``, the needed change is estimated by one preconditioned gradient step,
    transposed, and scaled to spectral norm one::

        D     = -Z^-1 G^T diag(1/y) / sigma                                   (in, out)
        Omega = -bias_weight * D D^T + beta * sum(1/y) / (N sigma^2) * Z^-1   (in, in)

    The first term of ``Omega`` is the part of the change that a subspace misses, the second the
    sampling noise of ``N`` samples inside it. ``A0`` = the ``rank`` smallest eigenvectors of
    ``Omega``, ``B0 = A0^T D``, and ``A = A0^T / sqrt(gamma)``, ``B = B0^T / sqrt(gamma)``.

    Args:
        beta: weight of the variance term. It scales with the damping and the loss, so the published
            0.03 belongs to the published damping (`paper`).
        bias_weight: weight of the bias term.
        gamma: both factors are divided by its root.
        damping: added to the diagonals of both factors, see `damping_mode`.
        damping_mode: ``"relative"``: times the mean of each factor's own diagonal; ``"absolute"``:
            as it is, for both. Absolute damping far below a factor's scale leaves it numerically
            singular; that is an error here, as in the release's first commit. Its newest goes on.
        population: ``N``, the size of the fine-tuning set; None takes what the statistics know: the
            length of the data set, or the number of sequences counted.
        scale: ``"paper"``: the factors above. ``"calibrated"``: ``A`` has rows of a default LoRA
            row's norm, ``1/sqrt(3)``, and ``B A`` has the length along ``(A0 B0)^T`` at which
            held-back sequences have the least loss, measured by `get_peft_model`, no layer moving by
            more than a quarter of its weight's norm.
        output_damping: ``lambda_y`` is so many times the median of ``diag(Sy)``; None: as `damping`.
        rescale_variance: make the variance term as large as the bias term, in Frobenius norm, before
            `beta`; ``N`` then has no effect.
        balance: split ``B A`` by roots of its singular values instead.

    The last three are options that the published run leaves off. Left out are the release's output factor
    from few sequences (``sequence_lowrank``, by the Woodbury identity), which needs a statistic of its
    own, every sequence's summed output gradient; and other powers of ``sigma``.

    Deviations from the release: eigenvectors to a residual tolerance instead of ten LOBPCG
    iterations, the spectral norm to that tolerance instead of 16 power iterations, relative damping
    by default. `paper` gives its published settings.
    """

    beta: float = 0.03
    bias_weight: float = 1.0
    gamma: float = 1024.0
    damping: float = 1e-3
    damping_mode: DampingMode = "relative"
    population: float | None = None
    scale: Literal["paper", "calibrated"] = "paper"
    output_damping: float | None = None
    rescale_variance: bool = False
    balance: bool = False

    reads_weight: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset(
        {"gradient", "input_second_moment", "output_second_moment_diagonal"}
    )
    layer_workspace: ClassVar[int] = 4  # 3.5 measured on an H200, a layer of 11,008 inputs
    trust_region: ClassVar[float] = TRUST_REGION  # where the length is measured, see `Natural`

    def __post_init__(self) -> None:
        require_types(self)
        require_number("beta", self.beta)
        require_number("bias_weight", self.bias_weight, inclusive=False)
        require_number("gamma", self.gamma, inclusive=False)
        require_damping(self.damping, self.damping_mode)
        require_choice("scale", self.scale, ("paper", "calibrated"))
        if self.population is not None:
            require_number("population", self.population, inclusive=False)
        if self.output_damping is not None:
            require_number("output_damping", self.output_damping, inclusive=False)
        options.check_balance(self.balance, self.calibrated)

    @property
    def calibrated(self) -> bool:
        """Whether the length is to be measured."""
        return self.scale == "calibrated"

    @classmethod
    def paper(cls, population: float | None = None) -> LoraDA:
        """Settings of the authors' release: absolute damping 1e-6, beta 0.03, gamma 1024.

        Args:
            population: ``N``, 100,000 there. None: what the statistics know; a few hundred sequences
                make the variance term hundreds of times heavier, which is said.
        """
        return cls(0.03, 1.0, 1024.0, 1e-6, "absolute", population)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        """Factors of one layer or a stack of layers; see the class for the formula.

        Args:
            weight: ``(..., out, in)``; only its shape and dtype are read.
            statistics: with ``gradient``, ``input_second_moment`` and the output diagonal.
            rank: number of directions.
            scaling: not used: the release leaves the adapter's scaling on top.

        Returns:
            ``A`` ``(..., rank, in)`` with orthogonal rows of norm ``1/sqrt(gamma)`` (``1/sqrt(3)``
            if calibrated, and ``B`` that much longer), ``B`` ``(..., out, rank)``; not anchored.
        """
        del scaling
        linalg.check_rank(rank, *weight.shape[-2:])
        dtype = linalg.compute_dtype(weight, statistics)
        fisher = self._fisher(statistics)
        found = self._iterated(fisher, rank, exact=dtype == torch.float64)
        subspace, content = self._dense(fisher, rank) if found is None else found
        a, b = options.balanced(subspace, content) if self.balance else (subspace.mT, content)
        sizes = (ROW_NORM, 1 / ROW_NORM) if self.calibrated else (self.gamma**-0.5,) * 2
        a, b = (a * sizes[0]).to(dtype), (b * sizes[1]).to(dtype)
        return Factors(a.to(weight.device), b.to(weight.device), anchored=False)

    def _fisher(self, statistics: LayerStatistics) -> _Fisher:
        gradient = linalg.check_finite(statistics.gradient, "the gradient")
        second = statistics.input_second_moment
        # Damping is far below a factor's scale: what float32 factors, it may factor badly.
        diagonal = linalg.double_precision(statistics.output_second_moment_diagonal)
        y_damping = linalg.damping_value(diagonal, self.damping, self.damping_mode)
        y_damping = options.median_damping(diagonal, self.output_damping, y_damping)

        def z_damping(moment: Tensor) -> Tensor:
            own = linalg.double_precision(moment.diagonal(dim1=-2, dim2=-1))
            return linalg.damping_value(own, self.damping, self.damping_mode)

        def factor(moment: Tensor) -> Tensor:
            return linalg.damped_cholesky(moment, z_damping(moment), "the input second moment")

        y_inverse = 1.0 / (diagonal + y_damping.unsqueeze(-1))
        number = options.population(self.population, statistics, y_damping)
        variance = self.beta * y_inverse.sum(-1) / number
        root, bound = linalg.once(factor, second), 1 / z_damping(second)
        found = _Fisher(root, gradient.to(y_inverse.device), y_inverse, variance, bound)
        if self.rescale_variance:
            ratio = options.rescaled_variance(found.change(), found.z_factor)
            found = replace(found, variance=self.beta * self.bias_weight * ratio)
        return found

    def _iterated(self, fisher: _Fisher, rank: int, *, exact: bool) -> tuple[Tensor, Tensor] | None:
        """``A0`` and ``D^T A0``, with ``D`` never formed; None if that is no gain, or fails.

        All an iteration needs is products with ``Z^-1`` and ``H = diag(1/y) G``. Eigenvectors of
        ``Omega`` do not need ``sigma``: those of ``sigma^2 Omega`` are the same. The eigenvalues
        sought may be far below the variance term's largest, so what comes out is measured in float64,
        and asked for residuals below 1e-10 of the largest eigenvalue sought, or (float32) below `EACH` of
        a vector's own; the products before may have fewer digits.
        """
        if self.beta == 0 or not linalg.iterates(fisher.z_factor):
            return None
        triangle = triangle_of(fisher.z_factor)
        # Units in which nothing over- or underflows in float32.
        unit, length = fisher.inverse_bound, fisher.length()
        h = fisher.scaled(length)
        ratio = fisher.variance / (unit * length.square()) / self.bias_weight

        def inverse(block: Tensor) -> Tensor:
            whole = triangle.solve_transposed(triangle.solve(block))
            return whole / unit[..., None, None]

        exactly = _Products(inverse, h.matmul, h.mT.matmul, ratio[..., None, None])
        fewer = isinstance(triangle, Triangle) and not exact and (triangle, unit, h, ratio)
        rough, coarse = _with_fewer_digits(*fewer) if fewer else (None, None)
        # Few inputs come near the damping: the variance term is far smaller than it allows, and the
        # longer the spectrum is thought to be, the higher is the polynomial.
        like, quickest = h.mT[..., :1], coarse or rough
        largest = (
            linalg.bound_of_operator(inverse, like)
            if quickest is None
            else linalg.bound_of_operator(quickest.inverse, like.float())
        ).to(ratio)
        found = linalg.smallest_of_operator(
            exactly.omega,
            h.mT,
            rank,
            upper=ratio * largest,
            tolerance=1e-10 if exact else 1e-8,
            each=0.0 if exact else EACH,
            rough=None if rough is None else rough.omega,
            coarse=None if coarse is None else coarse.omega,
        )
        if found is None:
            return None
        # A value's error is the square of its vector's.
        longest = linalg.smallest_of_operator(
            exactly.missed,
            h.mT,
            1,
            upper=torch.zeros_like(ratio),
            tolerance=1e-6 if exact else 3e-3,
            rough=None if rough is None else rough.missed,
            coarse=None if coarse is None else coarse.missed,
            start=found[1],
        )
        if longest is None:
            return None
        norm = (-longest[0][..., 0]).clamp_min(0).sqrt()
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        subspace = found[1][..., :rank]
        content = -(h @ inverse(subspace))
        return subspace, content / norm[..., None, None]

    def _dense(self, fisher: _Fisher, rank: int) -> tuple[Tensor, Tensor]:
        """``A0`` and ``D^T A0`` from dense decompositions of ``Omega``, or of ``D`` without variance."""
        change = fisher.change()
        if self.beta == 0:
            subspace = linalg.top_singular(change, rank)[0]
        # Omega times sigma squared has Omega's eigenvectors.
        square = change @ change.mT
        if self.beta > 0:
            inverse = linalg.once(torch.cholesky_inverse, fisher.z_factor)
            omega = fisher.variance[..., None, None] * inverse - self.bias_weight * square
            subspace = linalg.fix_signs(linalg.eigh(omega)[1][..., :rank])
        norm = linalg.largest_eigenvalue(square, near=subspace).sqrt()
        # A zero gradient asks for no change; its direction is then the variance term's alone.
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        return subspace, change.mT @ subspace / norm[..., None, None]

    def doubt(self, statistics: LayerStatistics) -> str | None:
        """That ``N`` may be a sample's size; None where it is stated, large, or has no effect."""
        if self.population is not None or self.beta == 0 or self.rescale_variance:
            return None
        return options.doubt_of_few(options.population(None, statistics, torch.zeros(())))
