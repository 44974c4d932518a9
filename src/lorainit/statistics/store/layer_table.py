"""The tables in a statistics file, written and read: JSON and tensors from strangers, all checked.

Everything that does not fit raises ValueError, TypeError or KeyError; `Statistics.load` says which
file it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor

from lorainit.statistics.store.possible import check_possible
from lorainit.types import LayerStatistics, LossReduction

FINGERPRINT = "fingerprint/"
LAYER = "layer/"

SYMMETRIC = ("/input_second_moment_sum", "/output_second_moment_sum")
"""How the keys of symmetric matrices end."""

_DIMENSIONS = {
    "gradient_sum": 2,
    "input_second_moment_sum": 2,
    "input_sum": 1,
    "input_counts": 1,
    "output_second_moment_sum": 2,
    "output_second_moment_diagonal_sum": 1,
}


def layer_record(layer: LayerStatistics, places: Mapping[str, str]) -> dict[str, Any]:
    """A layer's counts, and the keys under which its tensors are stored."""
    return {
        "tensors": dict(places),
        **{field: float(getattr(layer, field)) for field in LayerStatistics.COUNTS},
        "loss_reduction": layer.loss_reduction,
        "population": None if layer.population is None else float(layer.population),
    }


def read_table(text: str) -> dict[str, dict[str, Any]]:
    """Records by layer, from their JSON table; each has a dictionary of its tensors' keys."""
    table = _dictionary(json.loads(text), "the table of layers")
    if not table:
        raise ValueError("there is no layer in it")
    for name, record in table.items():
        entry = _dictionary(record, f"the record of layer '{name}'")
        places = _dictionary(entry["tensors"], f"the tensors of layer '{name}'")
        if not all(isinstance(key, str) for key in places.values()):
            raise TypeError(f"the tensors of layer '{name}' are not named by texts")
    return table


def read_triangles(text: str) -> dict[str, int]:
    """Widths of the matrices that are stored as their upper triangle, by key."""
    table = _dictionary(json.loads(text), "the table of triangles")
    for key, width in table.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"the triangle '{key}' has the width {width!r}")
    return table


def read_layers(
    table: Mapping[str, dict[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, LayerStatistics]:
    """Layers from their records."""
    return {name: _read_layer(name, entry, tensors) for name, entry in table.items()}


def read_metadata(text: str) -> dict[str, Any]:
    """Metadata from JSON; what the library itself reads of them is checked."""
    metadata = _dictionary(json.loads(text), "metadata")
    unused = metadata.get("unused", [])
    if not isinstance(unused, list) or not all(isinstance(name, str) for name in unused):
        raise TypeError("the unused layers are not a list of names")
    return metadata


def read_fingerprints(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, Tensor]:
    """Fingerprints of the layers' base weights, where the file holds them."""
    found = {}
    for name in layers:
        tensor = tensors.get(FINGERPRINT + name)
        if tensor is None:
            continue
        if tensor.dim() != 1 or not tensor.is_floating_point():
            raise ValueError(f"the fingerprint of layer '{name}' is not a floating vector")
        found[name] = tensor
    return found


def _read_layer(
    name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LayerStatistics:
    places = entry["tensors"]
    unknown = set(places) - set(LayerStatistics.TENSORS)
    if unknown:
        raise ValueError(f"layer '{name}' has unknown tensors {sorted(unknown)}")
    if entry["loss_reduction"] not in get_args(LossReduction):
        raise ValueError(f"layer '{name}' has an unknown loss reduction")
    population = entry["population"]
    layer = LayerStatistics(
        gradient_sum=_tensor(places, "gradient_sum", tensors),
        input_second_moment_sum=_tensor(places, "input_second_moment_sum", tensors),
        input_sum=_tensor(places, "input_sum", tensors),
        input_counts=_tensor(places, "input_counts", tensors),
        output_second_moment_sum=_tensor(places, "output_second_moment_sum", tensors),
        output_second_moment_diagonal_sum=_tensor(
            places, "output_second_moment_diagonal_sum", tensors
        ),
        sequences=_count(entry, "sequences"),
        label_tokens=_count(entry, "label_tokens"),
        positions=_count(entry, "positions"),
        loss_reduction=entry["loss_reduction"],
        population=None if population is None else _count(entry, "population"),
    )
    _check_widths(name, layer)
    check_possible(name, layer)
    return layer


def _dictionary(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is not a dictionary")
    return value


def _count(entry: Mapping[str, Any], field: str) -> float:
    value = entry[field]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is not a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{field} is {value}")
    return float(value)


def _tensor(places: Mapping[str, Any], field: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    if field not in places:
        return None
    tensor = tensors[places[field]]
    if tensor.dim() != _DIMENSIONS[field] or not tensor.is_floating_point():
        raise ValueError(
            f"{field} is a {str(tensor.dtype).removeprefix('torch.')} tensor of shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor


def _check_widths(name: str, layer: LayerStatistics) -> None:
    """All tensors of a layer are of one ``(out, in)``."""
    inputs, outputs = [], []
    for field, out_dimensions, in_dimensions in (
        ("gradient_sum", (0,), (1,)),
        ("input_second_moment_sum", (), (0, 1)),
        ("input_sum", (), (0,)),
        ("input_counts", (), (0,)),
        ("output_second_moment_sum", (0, 1), ()),
        ("output_second_moment_diagonal_sum", (0,), ()),
    ):
        tensor = getattr(layer, field)
        if tensor is not None:
            outputs += [tensor.shape[d] for d in out_dimensions]
            inputs += [tensor.shape[d] for d in in_dimensions]
    if len(set(inputs)) > 1 or len(set(outputs)) > 1:
        raise ValueError(f"the tensors of layer '{name}' are not of one layer's shape")
