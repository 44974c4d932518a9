"""Factors of every target from its statistics: layers of one shape are solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.errors import AdapterError, LorainitError, NonFiniteError
from lorainit.statistics import Statistics
from lorainit.types import Factors, LayerSpec, LayerStatistics, Method

_CHUNK_BYTES = 1 << 30


def solve_layers(
    targets: Mapping[str, Target],
    statistics: Statistics | None,
    method: Method,
    *,
    precision: Literal["fast", "exact"] = "fast",
    progress: bool = True,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Factors of every target, and ``|s B A| / |W|`` of each.

    Layers of one shape, rank and scaling are solved together.
    """
    solved: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    bar = tqdm(
        total=len(targets),
        desc=type(method).__name__,
        unit="layer",
        disable=None if progress else True,
    )
    with bar, torch.no_grad():
        for chunk in _chunks(targets):
            weights = [read_weight(t.module, t.name) for t in chunk]
            layers = [
                LayerStatistics() if statistics is None else statistics[t.name] for t in chunk
            ]
            for target, weight, pair in zip(
                chunk, weights, _solve_chunk(chunk, weights, layers, method, precision), strict=True
            ):
                solved[target.name] = pair
                sizes[target.name] = relative_size(pair, weight, target.spec.scaling)
            bar.update(len(chunk))
    return {name: solved[name] for name in targets}, sizes


def _solve_chunk(
    chunk: list[Target],
    weights: list[Tensor],
    layers: list[LayerStatistics],
    method: Method,
    precision: Literal["fast", "exact"],
) -> list[Factors]:
    """Solve a stack of layers of one shape; if that fails, one by one, to name the layer."""
    spec = chunk[0].spec
    dtype = torch.float64 if precision == "exact" else None
    moved = [
        _for_solving(layer, method.needs, weight.device, dtype)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    wide = [w.to(dtype) if dtype is not None else w for w in weights]
    if len(chunk) > 1:
        try:
            stacked = method.solve(
                torch.stack(wide), LayerStatistics.stack(moved), spec.rank, spec.scaling
            )
            _check_factors(stacked, spec, (len(chunk),))
            return [stacked[i] for i in range(len(chunk))]
        except (LorainitError, torch.OutOfMemoryError):
            if wide[0].is_cuda:
                torch.cuda.empty_cache()
    return [
        _solve_one(target, weight, layer, method)
        for target, weight, layer in zip(chunk, wide, moved, strict=True)
    ]


def _solve_one(target: Target, weight: Tensor, layer: LayerStatistics, method: Method) -> Factors:
    try:
        pair = method.solve(weight, layer, target.spec.rank, target.spec.scaling)
        _check_factors(pair, target.spec, ())
        return pair
    except LorainitError as error:
        raise type(error)(f"layer '{target.name}': {error}") from error


def _check_factors(pair: Factors, spec: LayerSpec, leading: tuple[int, ...]) -> None:
    """A method of the user's own may return anything."""
    have = tuple(pair.A.shape), tuple(pair.B.shape)
    want = (*leading, spec.rank, spec.in_features), (*leading, spec.out_features, spec.rank)
    if have != want:
        raise AdapterError(
            f"the method gave A, B of shapes {have}; the layer wants {want}. "
            "Correct the method's solve."
        )
    if not bool(torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
        raise NonFiniteError(
            "the method gave factors that are not finite. Look at the statistics, or raise damping."
        )


def _for_solving(
    layer: LayerStatistics, needs: frozenset[str], device: torch.device, dtype: torch.dtype | None
) -> LayerStatistics:
    """Only what the method reads, where the weight lies."""
    return layer.only(needs).to(device=device, dtype=dtype)


def _chunks(targets: Mapping[str, Target]) -> Iterator[list[Target]]:
    """Targets of one shape, rank, scaling and device, as many as fit a chunk."""
    groups: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets.values():
        spec = target.spec
        device = next((p.device for p in target.module.parameters()), None)
        key = (spec.out_features, spec.in_features, spec.rank, spec.scaling, device)
        groups.setdefault(key, []).append(target)
    for (rows, columns, *_), members in groups.items():
        size = 4 * (rows * rows + rows * columns + columns * columns)
        step = max(1, _CHUNK_BYTES // size)
        for first in range(0, len(members), step):
            yield members[first : first + step]


def relative_size(pair: Factors, weight: Tensor, scaling: float) -> float:
    """``|s B A|_F / |W|_F`` without forming the product."""
    a, b = pair.A.float(), pair.B.float()
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
    return float(scaling * square.sqrt() / weight.float().norm().clamp_min(1e-30))
