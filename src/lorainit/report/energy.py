"""Which layers matter: where most of the mean gradient's energy is, in words."""

from __future__ import annotations

from collections.abc import Sequence

from lorainit.report.measure import LayerReport

_SHOWN = 4
"""Projections that are named."""


def where_energy_is(layers: Sequence[LayerReport]) -> str:
    """One sentence: the fewest layers that hold half of ``|G|_F^2``, by projection and depth.

    Args:
        layers: with their energies; empty words where none has one.
    """
    known = [(layer, float(layer.energy)) for layer in layers if layer.energy]
    if not known:
        return ""
    known.sort(key=lambda pair: -pair[1])
    total, held = sum(energy for _, energy in known), 0.0
    most: list[tuple[LayerReport, float]] = []
    for pair in known:
        most.append(pair)
        held += pair[1]
        if held >= 0.5 * total:
            break
    groups: dict[str, list[tuple[LayerReport, float]]] = {}
    for pair in most:
        groups.setdefault(pair[0].projection, []).append(pair)
    order = sorted(groups.values(), key=lambda group: -sum(energy for _, energy in group))
    shown = ", ".join(
        f"{group[0][0].projection}{_blocks([layer.depth for layer, _ in group])} "
        f"({sum(energy for _, energy in group) / total:.0%})"
        for group in order[:_SHOWN]
    )
    left = sum(len(group) for group in order[_SHOWN:])
    more = f", and {left} more" if left else ""
    noun = "layer" if len(layers) == 1 else "layers"
    return f"Half of the gradient is in {len(most)} of {len(layers)} {noun}: {shown}{more}."


def _blocks(depths: Sequence[int | None]) -> str:
    """``of block 3``, ``of blocks 1, 4 to 7``; nothing for a layer without a number."""
    numbers = sorted({depth for depth in depths if depth is not None})
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f" of block{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"
