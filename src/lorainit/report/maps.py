"""Heat maps over depth and projection, one for each number that every layer has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lorainit.report.drawing import heat_map
from lorainit.report.measure import LayerReport


def energy_map(layers: Sequence[LayerReport]) -> str:
    """Shares of all of the mean gradient's energy; the colour is logarithmic."""
    known = {layer.name: layer.energy for layer in layers if layer.energy}
    if not known:
        return '<p class="none">The statistics hold no gradient.</p>'
    total = sum(known.values())
    logs = [math.log10(value) for value in known.values()]
    low, span = min(logs), max(max(logs) - min(logs), 1e-9)
    values = {}
    for layer in layers:
        if layer.name in known:
            share = known[layer.name] / total
            strength = (math.log10(known[layer.name]) - low) / span if len(known) > 1 else 1.0
            tip = f"{layer.name}: {known[layer.name]:.3g}, {share:.2%} of all"
            values[layer.depth, layer.projection] = (strength, _percent(share), tip)
    return _card(values, layers, "gradient energy by depth and projection")


def share_map(
    layers: Sequence[LayerReport],
    value_of: Callable[[LayerReport], float | None],
    *,
    percent: bool = True,
    top: float | None = None,
    tip_of: Callable[[LayerReport], str] | None = None,
    title: str = "",
) -> str:
    """One number of every layer, on a linear scale.

    Args:
        layers: of the page.
        value_of: the number; None of a layer that has none.
        percent: written as a share.
        top: the number of full colour; None: the largest.
        tip_of: what a cell's tooltip says; None: the number.
        title: over the map.
    """
    known = {layer.name: value for layer in layers if (value := value_of(layer)) is not None}
    if not known:
        return '<p class="none">Needs the gradient and both second moments in full.</p>'
    top = top or max(known.values()) or 1.0
    values = {}
    for layer in layers:
        if layer.name in known:
            value = known[layer.name]
            text = signed_percent(value) if percent else short_number(value)
            tip = f"{layer.name}: {text if tip_of is None else tip_of(layer)}"
            values[layer.depth, layer.projection] = max(0.0, min(1.0, value / top)), text, tip
    return _card(values, layers, "share by depth and projection", title)


def sample_map(layers: Sequence[LayerReport]) -> str:
    """How much the sample says about the inputs."""
    known = {layer.name: layer.directions for layer in layers if layer.directions}
    if not known:
        return ""
    top = math.log(max(known.values()) + 1)
    values = {}
    for layer in layers:
        if layer.name in known:
            count = known[layer.name]
            tip = f"{layer.name}: {count:.1f} of {layer.shape[1]}, from {layer.positions:.0f} positions"
            text = f"{count:.0f}" if count >= 10 else f"{count:.1f}"
            values[layer.depth, layer.projection] = (math.log(count + 1) / top, text, tip)
    return _card(values, layers, "effective directions")


def _card(
    values: Mapping[tuple[int | None, str], tuple[float, str, str]],
    layers: Sequence[LayerReport],
    label: str,
    title: str = "",
) -> str:
    heading = f"<h3>{title}</h3>" if title else ""
    columns = list(dict.fromkeys(layer.projection for layer in layers))
    return f'<div class="card fit">{heading}{heat_map(values, columns, label)}</div>'


def short_number(value: float) -> str:
    """Two digits: ``0.031``, ``1.2e-5``."""
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def signed_percent(share: float) -> str:
    """A share as a percentage, with one more digit below ten: ``31%``, ``4.2%``, ``−8%``."""
    digits = 1 if 0 < share < 0.0995 else 0
    text = f"{share:.{digits}%}"
    return "0%" if text in ("-0%", "0.0%") else text.replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else "<0.1%"
