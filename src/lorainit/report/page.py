"""One self-contained page: no script, no font, no image from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorainit._version import __version__
from lorainit.report.curves import Curve
from lorainit.report.drawing import COLOURS, DRAWN_LAYERS, chart, heat_map, matrix, spectra
from lorainit.report.measure import LayerReport
from lorainit.report.predicted_decrease import StartLoss, total
from lorainit.report.style import STYLE


@dataclass(frozen=True, eq=False)
class Facts:
    """What the page says beside the layers' numbers.

    Attributes:
        metadata: of the statistics.
        rank: that the page speaks of.
        anchored: whether the adapter given is.
        calibrated: whether the start's length was chosen for the least loss.
        loss: before and after the start, where it was measured.
        methods: whose subspaces were compared.
        curves: learning curves.
    """

    metadata: Mapping[str, Any]
    rank: int
    anchored: bool
    calibrated: bool
    loss: StartLoss | None
    methods: Sequence[str]
    curves: Sequence[Curve]


def render(
    layers: Sequence[LayerReport],
    facts: Facts,
    advice: Sequence[tuple[str, str]],
    *,
    title: str,
) -> str:
    """The whole page.

    Args:
        layers: what was measured of each.
        facts: what else there is.
        advice: weight and words.
        title: of the page.
    """
    rank = facts.rank
    sections = [
        _head(layers, facts, title),
        "<h2>What to do</h2>" + _advice(advice),
        _start(layers, facts),
        _curves(facts.curves),
        _section(
            "Where the data leans",
            "Energy of the mean gradient, |G|²: the stronger the colour, the more a layer would move the loss. "
            "The scale is logarithmic; a cell shows its share of all.",
            _energy(layers),
        ),
        _section(
            f"What rank {rank} keeps",
            "Share of the whitened gradient's energy in its leading directions, layer by layer: what a "
            "natural step of this rank keeps of the whole one.",
            _share(layers, lambda layer: layer.kept),
        ),
        _section(
            "Spectra",
            f"Share of each direction, largest first; {_drawn(layers)} faint, the median of all strong, "
            "the rank dashed. A steep fall before the rank: a lower one would do.",
            _spectra(layers, rank),
        ),
        _sample(layers),
    ]
    if facts.methods:
        sections.append(
            _section(
                "Do the methods agree?",
                "Mean squared cosine between the row spaces of A: 100% is one subspace; chance is about "
                f"{_chance(layers):.1%}. Over {sum(bool(x.overlap) for x in layers)} of {len(layers)} "
                "layers, spread over the depth.",
                f'<div class="card fit">'
                f"{matrix(facts.methods, _mean_overlap(layers), 'overlap of methods')}</div>",
            )
        )
    if any(layer.size is not None for layer in layers):
        anchored = " It is anchored, so it is subtracted at first." if facts.anchored else ""
        sections.append(
            _section(
                "How far the adapter goes",
                f"|s B A| / |W|, layer by layer.{anchored}",
                _share(layers, lambda layer: layer.size, percent=False),
            )
        )
    sections.append(_table(layers))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _start(layers: Sequence[LayerReport], facts: Facts) -> str:
    """The loss that the adapter was promised to have, and the one that it has."""
    promise = total({x.name: x.promise for x in layers if x.promise is not None})
    loss = facts.loss
    known = any(layer.promise is not None for layer in layers)
    if loss is None and not known:
        return ""
    rows: list[tuple[str, float | None, float | None]] = []
    if loss is not None:
        change = loss.start - loss.base
        rows += [
            ("the base model, measured", loss.base, None),
            ("with the adapter, measured", loss.start, change),
        ]
    start = loss.base if loss is not None else None
    if known and not facts.anchored:
        rows += [
            ("promised by the gradient alone", start, promise.slope),
            ("... by gradient and Fisher curvature", start, promise.change),
        ]
        if facts.calibrated:
            rows.append(("... by a parabola that is lowest here", start, promise.slope / 2))
    body = "".join(
        f"<tr><td>{name}</td><td>{_loss(value, change, measured='measured' in name)}</td>"
        f"<td>{'' if change is None else _signed(change)}</td></tr>"
        for name, value, change in rows
    )
    where = f" Measured on {loss.on}." if loss is not None else ""
    text = (
        "Loss of a label token. The Fisher's curvature takes layers and positions one by one, as the "
        "method does; those that pull together bend the loss far more, so it promises too much."
        + where
    )
    return _section(
        "The loss at the start",
        text,
        '<div class="card fit"><div class="scroll"><table class="plain"><thead><tr><th></th>'
        f"<th>loss</th><th>change</th></tr></thead><tbody>{body}</tbody></table></div></div>",
    )


def _signed(change: float) -> str:
    return f"{change:+.3g}".replace("-", "−")


def _loss(value: float | None, change: float | None, *, measured: bool) -> str:
    """The loss itself, where the base model's is known."""
    if value is None:
        return "–"
    return f"{value:.4f}" if measured or change is None else f"{value + change:.4f}"


def _curves(curves: Sequence[Curve]) -> str:
    """Held-out and training losses, each in a figure of its own, one colour a run in both."""
    if not curves:
        return ""
    names = list(dict.fromkeys(curve.name for curve in curves))
    shown = names[:COLOURS]
    cards = ""
    for held_out, title in ((True, "Held-out loss"), (False, "Training loss")):
        lines = {c.name: c.points for c in curves if c.held_out is held_out and c.name in shown}
        if lines:
            # A run without such a line keeps its colour for the other figure.
            drawn = chart([lines.get(name, ()) for name in shown], title)
            cards += f'<div class="card"><h3>{title}</h3>{drawn}</div>'
    legend = "".join(
        f'<span><i class="c{i}"></i>{escape(name)}</span>' for i, name in enumerate(shown)
    )
    more = f" {len(names) - len(shown)} more runs are not drawn." if len(names) > len(shown) else ""
    return _section(
        "Learning curves",
        "Long lines are faint, with their moving mean strong." + more,
        f'<div class="legend">{legend}</div><div class="grid2">{cards}</div>',
    )


def _sample(layers: Sequence[LayerReport]) -> str:
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
    ratio = min(layer.positions / layer.shape[1] for layer in layers)
    return _section(
        "Is the sample large enough?",
        "Effective directions of the inputs, (Σλ)² / Σλ²: few where a token or a feature outshines "
        f"all others. There are at least {ratio:.1f} counted positions for each input dimension; below "
        "1 damping fills the rest.",
        f'<div class="card fit">{heat_map(values, _columns(layers), "effective directions")}</div>',
    )


def _head(layers: Sequence[LayerReport], facts: Facts, title: str) -> str:
    metadata = facts.metadata
    shown = {
        "layers": f"{len(layers)}",
        "sequences": _count(metadata.get("sequences")),
        "label tokens": _count(metadata.get("label_tokens")),
        "positions": _count(max((layer.positions for layer in layers), default=0)),
        "mask": str(metadata.get("token_mask", "–")),
        "loss": str(metadata.get("loss_reduction", "–")),
        "rank": str(facts.rank),
        "lorainit": __version__,
    }
    cells = "".join(
        f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in shown.items()
    )
    return f'<h1>{escape(title)}</h1><dl class="facts">{cells}</dl>'


def _count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"


def _advice(said: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li class="{kind}">{escape(text)}</li>' for kind, text in said)
    return f'<ul class="advice">{items}</ul>'


def _section(title: str, text: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="soft">{escape(text)}</p>{body}'


def _columns(layers: Sequence[LayerReport]) -> list[str]:
    return list(dict.fromkeys(layer.projection for layer in layers))


def _energy(layers: Sequence[LayerReport]) -> str:
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
    drawn = heat_map(values, _columns(layers), "gradient energy by depth and projection")
    return f'<div class="card fit">{drawn}</div>'


def _short(value: float) -> str:
    """Two digits: ``0.031``, ``1.2e-5``."""
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _share(
    layers: Sequence[LayerReport],
    value_of: Callable[[LayerReport], float | None],
    *,
    percent: bool = True,
) -> str:
    known = {layer.name: value for layer in layers if (value := value_of(layer)) is not None}
    if not known:
        return '<p class="none">Needs the gradient and both second moments in full.</p>'
    top = 1.0 if percent else max(known.values()) or 1.0
    values = {}
    for layer in layers:
        if layer.name in known:
            value = known[layer.name]
            text = f"{value:.0%}" if percent else _short(value)
            values[layer.depth, layer.projection] = (
                min(1.0, value / top), text, f"{layer.name}: {text}"
            )  # fmt: skip
    drawn = heat_map(values, _columns(layers), "share by depth and projection")
    return f'<div class="card fit">{drawn}</div>'


def _drawn(layers: Sequence[LayerReport]) -> str:
    """Which layers have a line of their own."""
    if len(layers) <= DRAWN_LAYERS:
        return "every layer"
    return f"{DRAWN_LAYERS} of {len(layers)} layers, spread evenly,"


def _spectra(layers: Sequence[LayerReport], rank: int) -> str:
    kinds = (
        ("Inputs, Sx", [layer.input_spectrum for layer in layers]),
        ("Output gradients, Sy", [layer.output_spectrum for layer in layers]),
        ("Whitened gradient", [layer.signal for layer in layers]),
    )
    cards = "".join(
        f'<div class="card"><h3>{name}</h3>{spectra(lines, rank, name)}</div>'
        for name, lines in kinds
    )
    return f'<div class="grid3">{cards}</div>'


def _mean_overlap(layers: Sequence[LayerReport]) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        for pair, value in layer.overlap.items():
            sums.setdefault(pair, []).append(value)
    return {pair: sum(values) / len(values) for pair, values in sums.items()}


def _chance(layers: Sequence[LayerReport]) -> float:
    return sum(layer.rank / layer.shape[1] for layer in layers) / max(1, len(layers))


def _table(layers: Sequence[LayerReport]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = "".join(
        f"<tr><td>{escape(layer.name)}</td><td>{layer.shape[0]} × {layer.shape[1]}</td>"
        f"<td>{layer.rank}</td><td>{cell(layer.energy, '.3g')}</td><td>{cell(layer.kept, '.0%')}</td>"
        f"<td>{cell(layer.directions, '.1f')}</td><td>{layer.positions:,.0f}</td>"
        f"<td>{'–' if layer.size is None else _short(layer.size)}</td></tr>"
        for layer in layers
    )
    return (
        "<h2>Every layer</h2><details><summary>the numbers</summary>"
        '<div class="scroll"><table><thead><tr><th>layer</th><th>out × in</th><th>rank</th>'
        "<th>|G|²</th><th>kept</th><th>effective directions</th><th>positions</th>"
        f"<th>|s B A| / |W|</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
