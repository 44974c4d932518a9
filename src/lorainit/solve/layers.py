"""Factors of every target from its statistics: layers of one shape are solved together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.errors import AdapterError, LorainitError, NonFiniteError
from lorainit.linalg import double_precision
from lorainit.parallel import collectives
from lorainit.parallel.exchange import Slot, broadcast_from_owners
from lorainit.solve.gathered import read_in_turn
from lorainit.solve.ownership import after_out_of_memory, device_of, layer_owners
from lorainit.solve.stacks import rounds, together
from lorainit.solve.words import all_words, narrowed
from lorainit.statistics import Statistics
from lorainit.types import (
    DoubtsStatistics,
    Factors,
    LayerSpec,
    LayerStatistics,
    LimitsRank,
    Method,
    ReadsWeight,
)

logger = logging.getLogger("lorainit")


def solve_layers(
    targets: Mapping[str, Target],
    statistics: Statistics | None,
    method: Method,
    *,
    precision: Literal["fast", "exact"] = "fast",
    progress: bool = True,
    release: bool = False,
    max_memory: int | None = None,
    reference: ReferenceWeights | None = None,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Factors of every target, and ``|s B A| / |W|`` of each.

    Layers of one shape, rank and scaling are solved together. Many processes divide the work: each
    solves its part (the layers whose statistics it holds, where they are shared out), and gives it to
    the others. With `release` the statistics of solved layers are forgotten; `max_memory` is what
    everything on a device may take, in bytes. From `reference` the method gets what quantization took of
    each layer.
    """
    rank, size = collectives.world()
    owners = layer_owners(targets, statistics)
    failure: Exception | None = None
    solved: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    silent: list[str] = []
    doubts: dict[str | None, None] = {}
    bar = tqdm(
        total=len(targets),
        desc=type(method).__name__,
        unit="layer",
        disable=None if progress else True,
    )
    with bar, torch.no_grad():
        exact = precision == "exact"
        needed = not isinstance(method, ReadsWeight) or method.reads_weight
        matrices = 1 if reference is None else 2
        cut = rounds(
            targets, owners, size, statistics, method, max_memory, exact=exact, matrices=matrices
        )
        for chunks in cut:
            try:
                weights = read_in_turn(chunks, rank, partial(_weight, needed=needed))
                if chunks[rank] and failure is None:
                    chunk = chunks[rank]
                    layers = [
                        LayerStatistics() if statistics is None else statistics[t.name]
                        for t in chunk
                    ]
                    if reference is not None:
                        layers = [
                            replace(layer, weight_error=reference.error(target, weight))
                            for target, weight, layer in zip(chunk, weights, layers, strict=True)
                        ]
                    if isinstance(method, DoubtsStatistics):
                        doubts |= dict.fromkeys(map(method.doubt, layers))
                    if method.needs & {"gradient", "output_second_moment"}:
                        silent += _without_gradient(chunk, layers)
                    part, held, layers, words = narrowed(
                        chunk, weights, layers, _ranks_used(method)
                    )
                    pairs = _solve_parts(part, held, layers, method, precision)
                    pairs = [all_words(*own) for own in zip(pairs, words, chunk, strict=True)]
                    del layers, held
                    found = [
                        relative_size(pair, weight, target.spec.scaling)
                        for target, weight, pair in zip(chunk, weights, pairs, strict=True)
                    ]
                    names = [target.name for target in chunk]
                    solved |= dict(zip(names, pairs, strict=True))
                    sizes |= dict(zip(names, torch.stack(found).tolist(), strict=True))
            except Exception as error:
                # Others wait for this process where weights are gathered: raise when all are done.
                failure = failure or error
                if size == 1:
                    break
            if release and statistics is not None:
                for target in chunks[rank]:
                    statistics.release(target.name)
            bar.update(sum(map(len, chunks)))
        collectives.raise_everywhere(failure)
        for doubt in filter(None, doubts):
            _warn_once(doubt)
        if silent:
            logger.warning(
                "%s: the gradient of %d of %d layers is exactly zero (%s): the data say nothing about "
                "them. Look at the labels and at loss_fn, or leave them out with exclude_modules.",
                type(method).__name__,
                len(silent),
                len(targets),
                ", ".join(silent[:3]) + (", ..." if len(silent) > 3 else ""),
            )
        if size > 1:
            solved, sizes = _exchanged(targets, owners, solved, sizes)
    return {name: solved[name] for name in targets}, {name: sizes[name] for name in targets}


@cache
def _warn_once(words: str) -> None:
    """Where a start is made part by part, too."""
    logger.warning(words)


def _ranks_used(method: Method) -> int:
    """How many times the rank a method needs."""
    return method.rank_factor if isinstance(method, LimitsRank) else 1


def _without_gradient(chunk: Sequence[Target], layers: Sequence[LayerStatistics]) -> list[str]:
    names, told = [], []
    for target, layer in zip(chunk, layers, strict=True):
        # FILet reads what gradients are like without their sum.
        one = layer.output_second_moment_sum if layer.gradient_sum is None else layer.gradient_sum
        if one is not None:
            names.append(target.name)
            told.append(one.any())
    # All are asked before the first is waited for; some may lie on the host.
    return [name for name, one in zip(names, told, strict=True) if not bool(one)]


def _weight(target: Target, *, needed: bool) -> Tensor:
    """A target's weight; one that cannot be read is zero for a method that reads none."""
    try:
        return read_weight(target.module, target.name)
    except AdapterError:
        if needed:
            raise
    shape = target.spec.out_features, target.spec.in_features
    return torch.zeros(1, 1, device=device_of(target)).expand(shape)


def _exchanged(
    targets: Mapping[str, Target],
    owners: Mapping[str, int],
    solved: Mapping[str, Factors],
    sizes: Mapping[str, float],
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Every process's factors on every process, the same to the last bit."""
    described = {n: (f.A.dtype, f.B.dtype, f.anchored, sizes[n]) for n, f in solved.items()}
    known = {
        n: entry for theirs in collectives.gather_objects(described) for n, entry in theirs.items()
    }
    tensors = {(n, "A"): f.A for n, f in solved.items()} | {
        (n, "B"): f.B for n, f in solved.items()
    }
    by_device: dict[torch.device, list[Slot]] = {}
    for name, target in targets.items():
        spec, (a_dtype, b_dtype, *_) = target.spec, known[name]
        by_device.setdefault(device_of(target), []).extend(
            [
                Slot((name, "A"), owners[name], (spec.rank, spec.in_features), a_dtype),
                Slot((name, "B"), owners[name], (spec.out_features, spec.rank), b_dtype),
            ]
        )
    for device, slots in by_device.items():
        broadcast_from_owners(tensors, slots, device)
    factors = {n: Factors(tensors[n, "A"], tensors[n, "B"], known[n][2]) for n in targets}
    return factors, {n: known[n][3] for n in targets}


def _solve_parts(
    chunk: list[Target],
    weights: list[Tensor],
    layers: list[LayerStatistics],
    method: Method,
    precision: Literal["fast", "exact"],
) -> list[Factors]:
    """Solve a stack of layers of one shape; if that fails, one by one, to name the layer.

    Where the device's memory does not do: in halves, and a single layer on the CPU.
    """
    try:
        return _solve_stack(chunk, weights, layers, method, precision)
    except torch.OutOfMemoryError:
        # Handled below: until here the traceback holds what was allocated.
        pass
    device = weights[0].device
    parts, place = after_out_of_memory(chunk, device)
    pairs, first = [], 0
    for part in parts:
        own = slice(first, first := first + len(part))
        held = [weight.to(place) for weight in weights[own]]
        pairs += _solve_parts(part, held, layers[own], method, precision)
    return [Factors(p.A.to(device), p.B.to(device), p.anchored) for p in pairs]


def _solve_stack(
    chunk: list[Target],
    weights: list[Tensor],
    layers: list[LayerStatistics],
    method: Method,
    precision: Literal["fast", "exact"],
) -> list[Factors]:
    spec = chunk[0].spec
    dtype = torch.float64 if precision == "exact" else None
    wide = weights if dtype is None else [double_precision(weight) for weight in weights]
    if len(chunk) > 1:
        try:
            stacked = _solve_together(wide, layers, spec, method, dtype)
            _check_factors(stacked, spec, (len(chunk),))
            return [stacked[i] for i in range(len(chunk))]
        except LorainitError:
            # One of them cannot be solved: which, is found below.
            pass
    return [
        _solve_one(target, weight, _for_solving(layer, method.needs, weight.device, dtype), method)
        for target, weight, layer in zip(chunk, wide, layers, strict=True)
    ]


def _solve_together(
    weights: list[Tensor],
    layers: list[LayerStatistics],
    spec: LayerSpec,
    method: Method,
    dtype: torch.dtype | None,
) -> Factors:
    """All layers at once; what belongs to an input that several share is there once."""
    stack = torch.stack(weights)
    statistics, sharing = together(layers, method.needs, stack.device, dtype)
    if sharing > 1:
        stack = stack.reshape(-1, sharing, *stack.shape[1:])
    found = method.solve(stack, statistics, spec.rank, spec.scaling)
    if sharing == 1:
        return found
    return Factors(found.A.flatten(0, 1), found.B.flatten(0, 1), found.anchored)


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


def relative_size(pair: Factors, weight: Tensor, scaling: float) -> Tensor:
    """``|s B A|_F / |W|_F``, 0-dimensional, without forming the product; NaN of a weight of zeros."""
    a, b = pair.A.float(), pair.B.float()
    square = ((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0)
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dtype=wide)
    size: Tensor = scaling * square.sqrt() / norm.clamp_min(1e-30)
    return size.where(norm > 0, torch.nan)
