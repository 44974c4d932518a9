"""Losses by learning rate, with the suggested rate and its range."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lorainit.report.drawing import chart


@dataclass(frozen=True)
class RateCurve:
    """Losses at several rates.

    Attributes:
        name: what was run at each of them.
        points: rate and loss, by rate; only finite losses.
        suggested: the suggested rate, with the lower and the upper end of its range; None where there is none.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    suggested: tuple[float, float, float] | None = None


def of_measured(measured: Mapping[str, Any]) -> RateCurve | None:
    """The trials that an adapter's suggestion rests on, as its side file holds them."""
    points = _points(measured.get("learning_rate_trials", ()))
    names = ("learning_rate", "learning_rate_low", "learning_rate_high")
    suggested = _suggested([measured.get(name) for name in names])
    return RateCurve("after two steps of Adam", points, suggested) if len(points) > 1 else None


def read_rate_curves(path: str | os.PathLike[str]) -> list[RateCurve]:
    """Final losses of every method by rate, where the file is what ``lorainit compare`` wrote."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        found = []
        for name, runs in content["runs"].items():
            points = _points((run["rate"], run["loss"]) for run in runs)
            middle = content.get("suggested", {}).get(name)
            ends = content.get("suggested_range", {}).get(name, (middle, middle))
            found.append(RateCurve(f"{name}, after training", points, _suggested([middle, *ends])))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []  # another kind of file; what is damaged is said where its curves are read
    return [curve for curve in found if len(curve.points) > 1]


def drawn(curves: Iterable[RateCurve]) -> str:
    """A card for each curve: loss over the rate's logarithm, the suggestion marked, its range shaded."""
    cards = ""
    for curve in curves:
        line = [(math.log10(rate), loss) for rate, loss in curve.points]
        marks = None
        if curve.suggested is not None:
            value, low, high = map(math.log10, curve.suggested)
            marks = value, low, high
        figure = chart([line], f"loss by rate: {curve.name}", rates=True, marked=marks)
        cards += f'<div class="card"><h3>{escape(curve.name)}</h3>{figure}</div>'
    return f'<div class="grid2">{cards}</div>'


def _points(pairs: Any) -> tuple[tuple[float, float], ...]:
    found = {}
    for pair in pairs if isinstance(pairs, Iterable) else ():
        match pair:
            case int() | float() as rate, int() | float() as loss:
                if 0 < rate < math.inf and math.isfinite(loss):
                    found[float(rate)] = float(loss)
    return tuple(sorted(found.items()))


def _suggested(values: list[Any]) -> tuple[float, float, float] | None:
    if len(values) == 3 and all(isinstance(v, int | float) and 0 < v < math.inf for v in values):
        value, low, high = map(float, values)
        return value, low, high
    return None
