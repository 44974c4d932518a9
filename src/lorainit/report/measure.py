"""The numbers behind the page: what the data asks of each layer, and what a rank keeps of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorainit import linalg
from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.errors import LorainitError
from lorainit.methods.natural import Natural
from lorainit.report.quantization import QuantizationLoss
from lorainit.solve.stacks import input_key
from lorainit.solve.words import narrowed
from lorainit.statistics import Statistics
from lorainit.types import Diagonal, LayerStatistics, Method

_KEPT_VALUES = 64

_DENSE_LIMIT = 1024
"""Up to this size all eigenvalues are as quick as the leading ones."""


@dataclass(eq=False)
class LayerReport:
    """One layer.

    Attributes:
        name: dotted.
        depth: the number in its name, None where there is none.
        projection: the end of its name.
        shape: ``(out, in)``.
        rank: of its adapter.
        energy: ``|G|_F^2`` of the mean gradient.
        input_spectrum: leading eigenvalues of ``Sx`` over the sum of all, largest first.
        output_spectrum: of ``Sy``, or its sorted diagonal.
        signal: leading squared singular values of the whitened gradient over the sum of all.
        kept: share of the signal that the rank keeps.
        directions: effective number of input directions, ``(sum)^2 / sum of squares``.
        positions: counted positions.
        overlap: between the row spaces of two methods' ``A``, 0 to 1, by names.
        size: ``|s B A| / |W|`` of the adapter given.
        quantization: what it took, where the full-precision weights are given.
        configured_name: by which a LoraConfig's ``rank_pattern`` names it.
    """

    name: str
    depth: int | None
    projection: str
    shape: tuple[int, int]
    rank: int
    energy: float | None = None
    input_spectrum: list[float] = field(default_factory=list)
    output_spectrum: list[float] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    kept: float | None = None
    directions: float | None = None
    positions: float = 0.0
    overlap: dict[tuple[str, str], float] = field(default_factory=dict)
    size: float | None = None
    quantization: QuantizationLoss | None = None
    configured_name: str = ""


def measure_layer(
    target: Target,
    statistics: LayerStatistics | None,
    methods: Mapping[str, Method],
    *,
    size: float | None = None,
    spectra: dict[int, tuple[list[float], float]] | None = None,
) -> LayerReport:
    """All that is said of one layer.

    Args:
        target: the layer.
        statistics: of it; without them there are its shape and the adapter's size alone.
        methods: by name, those whose subspaces are compared.
        size: of an adapter, see `LayerReport`.
        spectra: of inputs that layers share, with the directions, by the id of their sum; read and
            added to.
    """
    spec = target.spec
    depth, projection = place_of(spec.name)
    found = LayerReport(
        spec.name,
        depth,
        projection,
        (spec.out_features, spec.in_features),
        spec.rank,
        size=size,
        configured_name=target.configured_name,
    )
    if statistics is None:
        return found
    found.positions = float(statistics.positions)
    have = statistics.available
    count = max(_KEPT_VALUES, 2 * spec.rank)
    with torch.no_grad():
        if "gradient" in have:
            found.energy = float(statistics.gradient.double().square().sum())
        if "input_second_moment" in have:
            known = {} if spectra is None else spectra
            key = input_key(statistics)
            if key not in known:
                moment = statistics.input_second_moment
                if isinstance(moment, Diagonal):
                    known[key] = _of_values(_double(moment.values), count)
                else:
                    moment = _double(moment)
                    known[key] = _spectrum(moment, count), _directions(moment)
            found.input_spectrum, found.directions = known[key]
        if "output_second_moment" in have:
            found.output_spectrum = _spectrum(_double(statistics.output_second_moment), count)
        elif "output_second_moment_diagonal" in have:
            diagonal = (
                statistics.output_second_moment_diagonal.double().sort(descending=True).values
            )
            found.output_spectrum = _shares(diagonal[:count], float(diagonal.sum()))
        if Natural.needs <= have:
            found.signal = _signal(statistics, count)
            found.kept = sum(found.signal[: spec.rank]) if found.signal else None
        found.overlap = _overlaps(target, statistics, methods)
    return found


def place_of(name: str) -> tuple[int | None, str]:
    """Depth and projection of a layer by its name: ``layers.3.mlp.up_proj`` is 3 and ``up_proj``."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    rest = re.sub(r"^.*?\.\d+\.", "", name)
    parts = [part for part in rest.split(".") if not part.isdigit()]
    short = parts[-1] if parts else name
    if short in ("dense", "query", "key", "value", "linear", "weight") and len(parts) > 1:
        short = ".".join(parts[-2:])
    return (int(numbers[0]) if numbers else None), short


def spread(targets: Sequence[Target], depths: int) -> set[str]:
    """Names of the layers of so many depths, spread evenly, the first and the last among them."""
    there = sorted({d for t in targets if (d := place_of(t.spec.name)[0]) is not None})
    if len(there) > depths:
        step = (len(there) - 1) / (depths - 1)
        there = [there[round(i * step)] for i in range(depths)]
    return {t.spec.name for t in targets if place_of(t.spec.name)[0] in {None, *there}}


def methods_served(statistics: Statistics, methods: Mapping[str, Any]) -> dict[str, Method]:
    """Those whose needs the statistics hold."""
    return {name: m for name, m in methods.items() if m.needs <= statistics.available}


def _double(matrix: Tensor) -> Tensor:
    return linalg.double_precision(matrix).cpu()


def _spectrum(matrix: Tensor, count: int) -> list[float]:
    """Leading eigenvalues of a positive semidefinite matrix over its trace."""
    if len(matrix) > _DENSE_LIMIT:
        values = linalg.largest_eigenvectors(matrix, count, tolerance=1e-6)[0]
    else:
        values = torch.linalg.eigvalsh(matrix).flip(0)[:count]
    return _shares(values, float(matrix.diagonal().sum()))


def _of_values(values: Tensor, count: int) -> tuple[list[float], float]:
    """`_spectrum` and `_directions` of a diagonal."""
    total, square = float(values.sum()), float(values.square().sum())
    leading = values.sort(descending=True).values[:count]
    return _shares(leading, total), total**2 / max(square, 1e-30)


def _directions(matrix: Tensor) -> float:
    """``(sum)^2 / sum of squares`` of the eigenvalues, by trace and Frobenius norm."""
    return float(matrix.diagonal().sum() ** 2 / matrix.square().sum().clamp_min(1e-30))


def _signal(statistics: LayerStatistics, count: int) -> list[float]:
    """Shares of the whitened gradient's squared singular values, by its smaller Gram matrix."""
    metric = Natural().metric(statistics)
    whitened = metric.whiten_gradient(linalg.double_precision(statistics.gradient)).cpu()
    wide = whitened.shape[0] <= whitened.shape[1]
    return _spectrum(whitened @ whitened.mT if wide else whitened.mT @ whitened, count)


def _shares(values: Tensor, total: float) -> list[float]:
    """Of a total; none of nothing."""
    return (values.clamp_min(0) / total).tolist() if total > 0 else []


def _overlaps(
    target: Target, statistics: LayerStatistics, methods: Mapping[str, Method]
) -> dict[tuple[str, str], float]:
    """``|P1 P2|_F^2 / r``, the mean squared cosine between two row spaces."""
    spec = target.spec
    weight = read_weight(target.module, spec.name).cpu()
    # Of an embedding the words that were seen.
    (_,), (weight,), (statistics,), _ = narrowed([target], [weight], [statistics], 2)
    bases: dict[str, Tensor] = {}
    for name, method in methods.items():
        try:
            part = statistics.only(method.needs).to(device="cpu")
            a = method.solve(weight, part, spec.rank, spec.scaling).A
        except LorainitError:
            continue
        bases[name] = torch.linalg.qr(a.double().mT)[0]
    names = list(bases)
    return {
        (first, second): float((bases[first].mT @ bases[second]).square().sum() / spec.rank)
        for i, first in enumerate(names)
        for second in names[i + 1 :]
    }
