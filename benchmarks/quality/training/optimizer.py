"""AdamW over a stack of adapters."""

from __future__ import annotations

from torch import Tensor


def adamw(
    weights: Tensor,
    compute: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    live: Tensor | None,
    scale: Tensor,
    rate: Tensor,
    step: Tensor,
) -> None:
    """One AdamW step in place, without weight decay; betas 0.9 and 0.999, epsilon 1e-8.

    Args:
        weights: ``(E, P)``, like its moments `first` and `second`.
        compute: the same rounded to the compute dtype, or `weights` itself.
        gradient: ``(E, P)``, any floating dtype.
        live: ``(P,)`` zero where a frozen half stands; None where there is none.
        scale: ``(E, 1)``, times the gradient (clipping).
        rate: ``(E, 1)`` learning rates of this step.
        step: one float, counted from one.
    """
    g = gradient.float() * scale
    if live is not None:
        g = g * live
    first.add_(0.1 * (g - first))
    second.mul_(0.999).add_(0.001 * g * g)
    size = (second / (1 - 0.999**step)).sqrt() + 1e-8
    weights.sub_(rate / (1 - 0.9**step) * first / size)
    if compute is not weights:
        compute.copy_(weights)
