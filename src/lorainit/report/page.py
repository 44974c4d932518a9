"""One self-contained page: no script, no font, no image from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lorainit._version import __version__
from lorainit.report.curves import Curve
from lorainit.report.drawing import matrix
from lorainit.report.energy import where_energy_is
from lorainit.report.maps import energy_map, share_map, short_number
from lorainit.report.measure import LayerReport
from lorainit.report.rate_curve import RateCurve
from lorainit.report.sections import (
    curves_section,
    quantization_sections,
    rates_section,
    sample_sections,
    section,
    spectra_section,
    start_section,
)
from lorainit.report.start_loss import StartLoss
from lorainit.report.style import STYLE

LEADING = 3
"""Sentences of advice that are always there."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What the page says beside the layers' numbers.

    Attributes:
        metadata: of the statistics.
        rank: that the page speaks of.
        anchored: whether the adapter given is.
        loss: before and after the start, where it was measured.
        methods: whose subspaces were compared.
        curves: learning curves.
        rates: losses by learning rate.
    """

    metadata: Mapping[str, Any]
    rank: int
    anchored: bool
    loss: StartLoss | None
    methods: Sequence[str]
    curves: Sequence[Curve]
    rates: Sequence[RateCurve] = ()


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
    sections = [
        f"<h1>{escape(title)}</h1>" + _advice(advice),
        _facts(layers, facts),
        start_section(facts.loss),
        rates_section(facts.rates),
        curves_section(facts.curves),
    ]
    # Without statistics there are the adapter and its record alone.
    if any(layer.positions for layer in layers):
        sections += _data_sections(layers, facts.rank)
    if facts.methods:
        sections.append(
            section(
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
            section(
                "How far the adapter goes",
                f"|s B A| / |W|, layer by layer.{anchored}",
                share_map(layers, lambda layer: layer.size, percent=False),
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


def _data_sections(layers: Sequence[LayerReport], rank: int) -> list[str]:
    """What the statistics say of the layers."""
    return [
        section(
            "Where the data leans",
            "Each layer's share of the mean gradient's energy, |G|². The stronger the colour, the more a layer "
            "can move the loss; the scale is logarithmic.",
            energy_map(layers),
            lead=where_energy_is(layers),
        ),
        *quantization_sections(layers),
        section(
            f"What rank {rank} keeps",
            "Share of the whitened gradient's energy in its leading directions, layer by layer: what a "
            "natural step of this rank keeps of the whole one.",
            share_map(layers, lambda layer: layer.kept, top=1.0),
        ),
        spectra_section(layers, rank),
        *sample_sections(layers),
    ]


def _facts(layers: Sequence[LayerReport], facts: Facts) -> str:
    metadata = facts.metadata
    shown = {
        "layers": f"{len(layers)}",
        "sequences": _count(metadata.get("sequences")),
        "label tokens": _count(metadata.get("label_tokens")),
        "positions": _count(max((layer.positions for layer in layers), default=0) or None),
        "mask": str(metadata.get("token_mask", "–")),
        "loss": str(metadata.get("loss_reduction", "–")),
        "rank": str(facts.rank),
        "lorainit": __version__,
    }
    cells = "".join(
        f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in shown.items()
    )
    return f'<dl class="facts">{cells}</dl>'


def _count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"


def _advice(said: Sequence[tuple[str, str]]) -> str:
    """The three sentences first, with their subjects in bold; then what else stands out."""
    first = ""
    for kind, text in said[:LEADING]:
        subject, _, words = text.partition(": ")
        first += f'<li class="{kind}"><b>{subject}</b><span>{_code(words[:1].upper() + words[1:])}</span></li>'
    others = "".join(f'<li class="{kind}">{_code(text)}</li>' for kind, text in said[LEADING:])
    also = (
        f'<h3 class="also">What else stands out</h3><ul class="advice">{others}</ul>'
        if others
        else ""
    )
    return f'<ol class="advice">{first}</ol>{also}'


def _code(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


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
        f"<td>{'–' if layer.size is None else short_number(layer.size)}</td></tr>"
        for layer in layers
    )
    return (
        "<h2>Every layer</h2><details><summary>the numbers</summary>"
        '<div class="scroll"><table><thead><tr><th>layer</th><th>out × in</th><th>rank</th>'
        "<th>|G|²</th><th>kept</th><th>effective directions</th><th>positions</th>"
        f"<th>|s B A| / |W|</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
