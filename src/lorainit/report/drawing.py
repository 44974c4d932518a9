"""Inline SVG: a heat map over depth and projection, and spectra with the rank marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_CELL = (46, 19)
_LIGHT_TEXT = 0.68
"""Above this strength the text of a cell takes the paper's colour."""


def heat_map(
    values: Mapping[tuple[int | None, str], tuple[float, str, str]],
    columns: Sequence[str],
    label: str,
) -> str:
    """Depth down, projection across.

    Args:
        values: by depth and projection: strength from 0 to 1, the text of the cell, its tooltip.
        columns: projections, in order.
        label: what it shows, for readers who do not see it.
    """
    depths = sorted({depth for depth, _ in values}, key=lambda d: -1 if d is None else d)
    left, top = 28, 34
    width, height = left + _CELL[0] * len(columns) + 2, top + _CELL[1] * len(depths) + 2
    parts = []
    for j, column in enumerate(columns):
        x = left + (j + 0.5) * _CELL[0]
        parts.append(_heading(column, x))
    for i, depth in enumerate(depths):
        y = top + i * _CELL[1]
        name = "–" if depth is None else str(depth)
        parts.append(
            f'<text class="axis" x="{left - 6}" y="{y + 13}" text-anchor="end">{name}</text>'
        )
        for j, column in enumerate(columns):
            if (depth, column) not in values:
                continue
            strength, text, tip = values[depth, column]
            x = left + j * _CELL[0]
            tone = "on" if strength > _LIGHT_TEXT else "off"
            parts.append(
                f'<g><title>{escape(tip)}</title><rect class="cell" x="{x + 1}" y="{y + 1}" '
                f'width="{_CELL[0] - 2}" height="{_CELL[1] - 2}" rx="2" '
                f'fill-opacity="{0.07 + 0.93 * strength:.3f}"/>'
                f'<text class="{tone}" x="{x + _CELL[0] / 2}" y="{y + 13.5}" '
                f'text-anchor="middle">{escape(text)}</text></g>'
            )
    return _svg(width, height, label, parts, natural=True)


_LINE = 8
"""Letters that fit over a cell."""


def _heading(name: str, x: float) -> str:
    """A column's name over it, on one line or two; all of it in the tooltip."""
    lines = "".join(
        f'<text class="axis" x="{x}" y="{28 - 12 * k}" text-anchor="middle">{escape(line)}</text>'
        for k, line in enumerate(reversed(_two_lines(name)))
    )
    return f"<g><title>{escape(name)}</title>{lines}</g>"


def _two_lines(name: str) -> list[str]:
    """A name as one line or two, broken after ``_``, ``.`` or ``-``: ``gate_`` and ``proj``."""
    if len(name) <= _LINE:
        return [name]
    breaks = [i + 1 for i, letter in enumerate(name[:-1]) if letter in "_.-"]
    at = min(breaks, key=lambda i: abs(2 * i - len(name)), default=len(name))
    return [
        part if len(part) <= _LINE else part[: _LINE - 1] + "…"
        for part in (name[:at], name[at:])
        if part
    ]


def spectra(lines: Sequence[Sequence[float]], rank: int, label: str) -> str:
    """Shares by number, largest first, logarithmic: layers faint, the median of all strong."""
    lines = [line for line in lines if line]
    if not lines:
        return '<p class="none">not collected</p>'
    width, height, left, right, top, bottom = 300, 170, 52, 8, 16, 24
    length = max(len(line) for line in lines)
    smallest = min((v for line in lines for v in line if v > 0), default=1.0)
    floor = float(max(-6, min(-2, math.floor(math.log10(smallest)))))

    def spot(index: int, value: float) -> str:
        x = left + (width - left - right) * index / max(1, length - 1)
        level = max(floor, math.log10(value)) if value > 0 else floor
        return f"{x:.1f},{top + (height - top - bottom) * level / floor:.1f}"

    parts = []
    for power in range(0, int(floor) - 1, -2):
        y = top + (height - top - bottom) * power / floor
        name = "100%" if power == 0 else f"{10.0 ** (power + 2):g}%"
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="axis" x="{left - 4}" y="{y + 4}" text-anchor="end">{name}</text>'
        )
    apart = max(1.0, len(lines) / DRAWN_LAYERS)
    for line in (lines[int(i * apart)] for i in range(min(len(lines), DRAWN_LAYERS))):
        points = " ".join(spot(i, v) for i, v in enumerate(line))
        parts.append(f'<polyline class="faint" points="{points}"/>')
    middle = []
    for i in range(length):
        column = sorted(line[i] for line in lines if len(line) > i)
        middle.append(spot(i, column[len(column) // 2]))
    parts.append(f'<polyline class="strong" points="{" ".join(middle)}"/>')
    if rank <= length:
        x = spot(rank - 1, 1.0).split(",")[0]
        late = rank > 0.7 * length
        side, shift = ("end", -4) if late else ("start", 4)
        parts.append(
            f'<line class="rank" x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}"/>'
            f'<text class="mark" x="{float(x) + shift}" y="{top - 4}" text-anchor="{side}">'
            f"r = {rank}</text>"
        )
    for index in sorted({0, length - 1}):
        x = spot(index, 1.0).split(",")[0]
        anchor = "start" if index == 0 else "end"
        parts.append(
            f'<text class="axis" x="{x}" y="{height - 8}" text-anchor="{anchor}">{index + 1}</text>'
        )
    return _svg(width, height, label, parts)


def chart(
    lines: Sequence[Sequence[tuple[float, float]]],
    label: str,
    *,
    rates: bool = False,
    marked: tuple[float, float, float] | None = None,
) -> str:
    """Losses over steps, one colour a line in the order given; an empty line keeps its colour.

    Long noisy lines are drawn faint, with their moving mean strong.

    Args:
        lines: step and loss, by step.
        label: what it shows, for readers who do not see it.
        rates: in place of steps there are decimal logarithms of learning rates.
        marked: a place on the axis, and the ends of a range around it.
    """
    width, height, left, right, top, bottom = 460, 250, 46, 12, 10, 30
    steps = [step for line in lines for step, _ in line]
    low, high, ticks = _scale([loss for line in lines for _, loss in line])
    first, last = min(steps), max(max(steps), min(steps) + (0.01 if rates else 1))

    def spot(step: float, loss: float) -> str:
        x = left + (width - left - right) * (step - first) / (last - first)
        y = top + (height - top - bottom) * (high - min(loss, high)) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks:
        y = float(spot(first, tick).split(",")[1])
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="axis" x="{left - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>'
        )
    if marked is not None:
        # A suggestion beyond what was tried stands at the edge.
        middle, left_end, right_end = (
            float(spot(min(max(x, first), last), low).split(",")[0]) for x in marked
        )
        parts.append(
            f'<rect class="range" x="{left_end}" y="{top}" width="{right_end - left_end:.1f}" '
            f'height="{height - top - bottom}"/>'
            f'<line class="rank" x1="{middle}" x2="{middle}" y1="{top}" y2="{height - bottom}"/>'
        )
    for step, anchor in ((first, "start"), ((first + last) / 2, "middle"), (last, "end")):
        x = spot(step, low).split(",")[0]
        name = f"step {step:,.0f}" if anchor == "start" else f"{step:,.0f}"
        if rates:
            name = f"rate {10**step:.1g}" if anchor == "start" else f"{10**step:.1g}"
        parts.append(
            f'<text class="axis" x="{x}" y="{height - 10}" text-anchor="{anchor}">{name}</text>'
        )
    for number, line in enumerate(lines):
        colour = f"line c{number % COLOURS}"
        if not line:
            continue
        smooth = _moving_mean(line)
        if smooth is not line:
            points = " ".join(spot(*point) for point in line)
            parts.append(f'<polyline class="{colour} noise" points="{points}"/>')
        points = " ".join(spot(*point) for point in smooth)
        parts.append(f'<polyline class="{colour}" points="{points}"/>')
        if len(line) <= _MARKED:
            for point in line:
                across, down = spot(*point).split(",")
                dot = f'<circle class="dot c{number % COLOURS}" cx="{across}" cy="{down}" r="3"/>'
                parts.append(dot)
    return _svg(width, height, label, parts)


DRAWN_LAYERS = 70
"""Layers whose spectra are drawn one by one."""

COLOURS = 8
"""Lines that can be told apart by colour."""

_MARKED = 12
"""Lines of up to so many points show them."""


def _moving_mean(line: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The mean of each point's neighbourhood, a tenth of the line; the line itself where it is short."""
    if len(line) < 2 * _MARKED:
        return line
    reach = len(line) // 20
    found = []
    for i, (step, _) in enumerate(line):
        near = line[max(0, i - reach) : i + reach + 1]
        found.append((step, sum(loss for _, loss in near) / len(near)))
    return found


def _scale(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Bottom, top and ticks of an axis; what is far above the rest is cut off at the top."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    if high - low > 4 * (usual - low) > 0:
        high = low + 2 * (usual - low)
    span = max(high - low, 1e-3 * abs(high), 1e-6)
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    bottom = math.floor(low / step) * step
    count = math.ceil((high - bottom) / step + 1e-9)
    ticks = [round(bottom + i * step, 12) for i in range(count + 1)]
    return bottom, ticks[-1], ticks


def matrix(names: Sequence[str], values: Mapping[tuple[str, str], float], label: str) -> str:
    """Overlaps of methods, two by two."""
    left, top, cell = 76, 34, 54
    width, height = left + cell * len(names) + 2, top + 30 * len(names) + 2
    parts = []
    for i, first in enumerate(names):
        y = top + 30 * i
        parts.append(_heading(first, left + cell * (i + 0.5)))
        parts.append(
            f'<text class="axis" x="{left - 6}" y="{y + 19}" text-anchor="end">{escape(first)}</text>'
        )
        for j, second in enumerate(names):
            value = 1.0 if i == j else values.get((first, second), values.get((second, first)))
            if value is None:
                continue
            tone = "on" if value > _LIGHT_TEXT else "off"
            parts.append(
                f'<rect class="cell" x="{left + cell * j + 1}" y="{y + 1}" width="{cell - 2}" '
                f'height="28" rx="2" fill-opacity="{0.07 + 0.93 * value:.3f}"/>'
                f'<text class="{tone}" x="{left + cell * (j + 0.5)}" y="{y + 19}" '
                f'text-anchor="middle">{value:.0%}</text>'
            )
    return _svg(width, height, label, parts, natural=True)


def _svg(
    width: float, height: float, label: str, parts: Sequence[str], *, natural: bool = False
) -> str:
    wide, least = 1.1 * width, 0.72 * width  # smaller on a phone, then it scrolls
    style = f' style="width:min(100vw - 58px,{wide:.0f}px);min-width:{least:.0f}px"'
    size = style if natural else ""
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}"{size}>{"".join(parts)}</svg></div>'
    )
