"""Statistics that no data can give: what a file holds is checked against what sums must obey."""

from __future__ import annotations

import torch
from torch import Tensor

from lorainit.types import LayerStatistics

_ROUNDING = 1e-2
"""Share of a bound by which sums in low precision may miss it."""

_ROWS = 512


def check_possible(name: str, layer: LayerStatistics) -> None:
    """Raise ValueError where counts and sums of a layer contradict each other.

    Sums are over at least one position or sequence. For a second moment ``S = sum x x^T`` over ``n``
    positions: ``S_ii >= 0``, ``|S_ij|^2 <= S_ii S_jj``, and ``(sum x_i)^2 <= n S_ii``. What is not finite
    is told where it is used.
    """
    of_positions = [f for f in layer.TENSORS if f != "gradient_sum" and _has(layer, f)]
    if of_positions and not float(layer.positions) > 0:
        raise ValueError(f"layer '{name}': {of_positions[0]} over no positions is impossible")
    count = layer.sequences if layer.loss_reduction == "sequence" else layer.label_tokens
    if layer.gradient_sum is not None and not float(count) > 0:
        raise ValueError(f"layer '{name}': gradient_sum over no sequences is impossible")
    for field in ("input_second_moment_sum", "output_second_moment_sum"):
        moment = getattr(layer, field)
        if moment is not None:
            _check_moment(f"layer '{name}': {field}", moment)
    if layer.input_counts is not None:
        if bool((layer.input_counts < 0).any()):
            raise ValueError(f"layer '{name}': a negative count of words is impossible")
        if float(layer.input_counts.double().sum()) > float(layer.positions) * (1 + _ROUNDING):
            raise ValueError(f"layer '{name}': a count of more words than positions is impossible")
    diagonal = layer.output_second_moment_diagonal_sum
    if diagonal is not None and bool((diagonal < 0).any()):
        raise ValueError(f"layer '{name}': a negative sum of squares is impossible")
    if layer.input_sum is not None and layer.input_second_moment_sum is not None:
        squares = layer.input_second_moment_sum.diagonal().double() * float(layer.positions)
        if bool((layer.input_sum.double().square() > squares * (1 + _ROUNDING) + 1e-30).any()):
            raise ValueError(f"layer '{name}': an input_sum beyond its squares is impossible")


def _has(layer: LayerStatistics, field: str) -> bool:
    return getattr(layer, field) is not None


def _check_moment(what: str, moment: Tensor) -> None:
    diagonal = moment.diagonal().double()
    if bool((diagonal < 0).any()):
        raise ValueError(f"{what} with a negative square is impossible")
    root = diagonal.sqrt()
    for begin in range(0, moment.shape[0], _ROWS):
        rows = moment[begin : begin + _ROWS].double()
        bound = root[begin : begin + _ROWS, None] * root[None] * (1 + _ROUNDING)
        if bool((rows.abs() > bound + torch.finfo(torch.float32).tiny).any()):
            raise ValueError(f"{what} with a product beyond its squares is impossible")
        other = moment[:, begin : begin + _ROWS].mT.double()
        if bool(((rows - other).abs() > bound * _ROUNDING + 1e-30).any()):
            raise ValueError(f"{what} that is not symmetric is impossible")
