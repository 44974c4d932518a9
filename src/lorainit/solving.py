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
from lorainit.statistics import Statistics, distributed
from lorainit.types import Factors, LayerSpec, LayerStatistics, Method, RanksDirections

_CHUNK_BYTES = 1 << 30

_CUDA_SHARE = 24
"""Of the memory that is free, one part in this many goes into a stack's statistics in float32: a
solve holds them in float64, and intermediates beside them."""


def solve_layers(
    targets: Mapping[str, Target],
    statistics: Statistics | None,
    method: Method,
    *,
    precision: Literal["fast", "exact"] = "fast",
    progress: bool = True,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Factors of every target, and ``|s B A| / |W|`` of each.

    Layers of one shape, rank and scaling are solved together. Many processes divide the work: each
    solves its part, and gives it to the others.
    """
    rank, size = distributed.world()
    failure: Exception | None = None
    solved: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    bar = tqdm(
        total=len(targets),
        desc=type(method).__name__,
        unit="layer",
        disable=None if progress else True,
    )
    with bar, torch.no_grad():
        for index, chunk in enumerate(list(_chunks(targets, size))):
            mine = index % size == rank and failure is None
            try:
                weights = _weights(chunk, mine)
                if mine:
                    layers = [
                        LayerStatistics() if statistics is None else statistics[t.name]
                        for t in chunk
                    ]
                    pairs = _solve_chunk(chunk, weights, layers, method, precision)
                    for target, weight, pair in zip(chunk, weights, pairs, strict=True):
                        solved[target.name] = pair
                        sizes[target.name] = relative_size(pair, weight, target.spec.scaling)
            except Exception as error:
                # Others wait for this process where weights are gathered: raise when all are done.
                failure = failure or error
                if size == 1:
                    break
            bar.update(len(chunk))
        distributed.raise_together(failure)
        if size > 1:
            solved, sizes = _exchanged(targets, solved, sizes)
    return {name: solved[name] for name in targets}, {name: sizes[name] for name in targets}


def value_directions(
    targets: Mapping[str, Target],
    statistics: Statistics,
    method: RanksDirections,
    limits: Mapping[str, int],
) -> dict[str, Tensor]:
    """What each layer's leading directions are worth, ``(limit,)`` by name, the same everywhere."""
    found: dict[str, Tensor] = {}
    by_limit: dict[int, dict[str, Target]] = {}
    for name, target in targets.items():
        by_limit.setdefault(limits[name], {})[name] = target
    with torch.no_grad():
        for limit, members in by_limit.items():
            for chunk in _chunks(members):
                layers = [
                    _for_solving(statistics[t.name], method.needs, _device(t), None) for t in chunk
                ]
                values = method.rank_values(LayerStatistics.stack(layers), limit).cpu()
                found |= {t.name: values[i] for i, t in enumerate(chunk)}
    distributed.broadcast([found[name] for name in targets], 0)
    return found


def _weights(chunk: list[Target], mine: bool) -> list[Tensor]:
    """The weights of a chunk that is to be solved here; sharded ones are gathered by everyone."""
    weights = []
    for target in chunk:
        if mine:
            weights.append(read_weight(target.module, target.name))
        elif hasattr(getattr(target.module, "weight", None), "full_tensor"):
            read_weight(target.module, target.name)
    return weights


def _exchanged(
    targets: Mapping[str, Target], solved: Mapping[str, Factors], sizes: Mapping[str, float]
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Every process's factors on every process, the same to the last bit."""
    described = {n: (f.A.dtype, f.B.dtype, f.anchored, sizes[n]) for n, f in solved.items()}
    rank, _ = distributed.world()
    factors: dict[str, Factors] = {}
    measured: dict[str, float] = {}
    for source, theirs in enumerate(distributed.gather_objects(described)):
        travelling: list[Tensor] = []
        for name, (a_dtype, b_dtype, anchored, size) in theirs.items():
            spec = targets[name].spec
            if source == rank:
                own = solved[name]
                pair = Factors(own.A.contiguous(), own.B.contiguous(), own.anchored)
            else:
                device = _device(targets[name])
                a = torch.empty(spec.rank, spec.in_features, dtype=a_dtype, device=device)
                b = torch.empty(spec.out_features, spec.rank, dtype=b_dtype, device=device)
                pair = Factors(a, b, anchored)
            factors[name], measured[name] = pair, size
            travelling += [pair.A, pair.B]
        distributed.broadcast(travelling, source)
    return factors, measured


def _device(target: Target) -> torch.device:
    """Where a layer's factors lie: with its weight, or on the CPU while that is elsewhere."""
    found = next((p.device for p in target.module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


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


def _chunks(targets: Mapping[str, Target], parts: int = 1) -> Iterator[list[Target]]:
    """Targets of one shape, rank, scaling and device, as many as fit a chunk, in `parts` or more."""
    groups: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets.values():
        spec = target.spec
        device = next((p.device for p in target.module.parameters()), None)
        key = (spec.out_features, spec.in_features, spec.rank, spec.scaling, device)
        groups.setdefault(key, []).append(target)
    for (rows, columns, *_), members in groups.items():
        size = 4 * (rows * rows + rows * columns + columns * columns)
        # What is free differs between processes, and all must cut the same.
        budget = -distributed.largest(-_chunk_bytes(members[0]))
        step = max(1, min(budget // size, -(-len(members) // parts)))
        for first in range(0, len(members), step):
            yield members[first : first + step]


def _chunk_bytes(target: Target) -> int:
    """How large a stack may be, in bytes of its statistics."""
    device = next((p.device for p in target.module.parameters()), None)
    if device is None or device.type != "cuda":
        return _CHUNK_BYTES
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free: int = torch.cuda.mem_get_info(device)[0] + reserved
    return max(_CHUNK_BYTES, free // _CUDA_SHARE)


def relative_size(pair: Factors, weight: Tensor, scaling: float) -> float:
    """``|s B A|_F / |W|_F`` without forming the product."""
    a, b = pair.A.float(), pair.B.float()
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
    norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return float(scaling * square.sqrt() / norm.clamp_min(1e-30))
