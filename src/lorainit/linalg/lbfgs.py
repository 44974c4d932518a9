"""L-BFGS for smooth convex functions of few numbers (Nocedal, Wright, Numerical Optimization, 2006, 7.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

_PAIRS = 20

_SHORTEST = 2.0**-10

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""The value and the gradient at a point."""


def minimize(
    objective: Objective, start: Tensor, *, tolerance: float, max_evaluations: int = 200
) -> Tensor:
    """The point of least value that was found.

    Every branch is taken by values and gradients of the objective alone, by exact comparisons: processes
    that are given the same ones take the same path, whatever their own arithmetic.

    Args:
        objective: its value may be not finite, which counts as infinitely bad.
        start: ``(n,)``, float64.
        tolerance: done where no entry of the gradient is larger.
        max_evaluations: at most so many.

    Returns:
        ``(n,)``. Steps are halved until the value falls; where none makes it fall the search ends.
    """
    point, (value, gradient) = start, objective(start)
    evaluations, pairs = 1, list[tuple[Tensor, Tensor]]()
    while evaluations < max_evaluations and float(gradient.abs().max()) > tolerance:
        direction = -_inverse_hessian(pairs, gradient)
        step = 1.0 if pairs else min(1.0, 1.0 / float(gradient.abs().max()))
        while True:
            trial = point + step * direction
            new_value, new_gradient = objective(trial)
            evaluations += 1
            if math.isfinite(new_value) and new_value < value:
                break
            step /= 2
            if step < _SHORTEST or evaluations >= max_evaluations:
                return point
        moved, turned = trial - point, new_gradient - gradient
        if moved @ turned > 1e-12 * turned @ turned:
            pairs = [*pairs[1 - _PAIRS :], (moved, turned)]
        point, value, gradient = trial, new_value, new_gradient
    return point


def _inverse_hessian(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """The two-loop recursion."""
    found, weights = gradient.clone(), []
    for moved, turned in reversed(pairs):
        weight = (moved @ found) / (moved @ turned)
        weights.append(weight)
        found = found - weight * turned
    if pairs:
        moved, turned = pairs[-1]
        found = found * ((moved @ turned) / (turned @ turned))
    for (moved, turned), weight in zip(pairs, reversed(weights), strict=True):
        found = found + moved * (weight - (turned @ found) / (moved @ turned))
    return found
