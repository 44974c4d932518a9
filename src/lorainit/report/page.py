"""One self-contained page: no script, no font, no image from anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from lorainit._version import __version__
from lorainit.report.advice import advice
from lorainit.report.drawing import heat_map, matrix, spectra
from lorainit.report.measure import LayerReport

_STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1f2328;--soft:#5d6670;--line:#dfe2e5;--heat:#0b7a75;
--on:#fff;--warn:#b54708;--good:#16743b;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--card:#1d2126;--ink:#e6e8ea;--soft:#9aa4ae;
--line:#343a41;--heat:#3fb8ae;--on:#0d1413;--warn:#f0a35e;--good:#6ccf8e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 4px}h2{font-size:1.15rem;margin:36px 0 4px}h3{font-size:.9rem;margin:0}
p{margin:4px 0 12px;max-width:70ch}.soft,.none{color:var(--soft)}.none{font-size:.85rem}
.facts{display:flex;flex-wrap:wrap;gap:8px 24px;margin:14px 0 0;padding:0}
.facts div{min-width:90px}.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-weight:600}
ul.advice{list-style:none;padding:0;margin:12px 0}
ul.advice li{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--soft);
border-radius:4px;padding:8px 12px;margin:8px 0;overflow-wrap:anywhere}
ul.advice .warn{border-left-color:var(--warn)}ul.advice .good{border-left-color:var(--good)}
.card{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px}
.fit{width:fit-content;max-width:100%}
.grid3{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:12px}
.scroll{overflow-x:auto}svg{width:100%;height:auto;display:block}.fit svg{width:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}svg .axis{fill:var(--soft)}
svg .on{fill:var(--on)}.cell{fill:var(--heat)}
polyline{fill:none}.faint{stroke:var(--heat);stroke-opacity:.18;stroke-width:1}
.strong{stroke:var(--heat);stroke-width:2}line.grid{stroke:var(--line)}
.rank{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:4 3}svg .mark{fill:var(--warn)}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
summary{cursor:pointer;color:var(--soft)}
"""


def render(
    layers: Sequence[LayerReport],
    metadata: Mapping[str, Any],
    *,
    title: str,
    rank: int,
    methods: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        layers: what was measured of each.
        metadata: of the statistics; ``"anchored"`` says that the adapter given is.
        title: of the page.
        rank: that the page speaks of.
        methods: whose subspaces were compared.
    """
    sections = [
        _head(layers, metadata, title, rank),
        "<h2>What to do</h2>" + _advice(layers, metadata),
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
            "Share of each direction, largest first; every layer faint, their median strong, the rank "
            "dashed. A steep fall before the rank: a lower one would do.",
            _spectra(layers, rank),
        ),
    ]
    if methods:
        sections.append(
            _section(
                "Do the methods agree?",
                "Mean squared cosine between the row spaces of A, over all layers: 100% is one subspace; "
                f"chance is about {_chance(layers):.1%}.",
                f'<div class="card fit">{matrix(methods, _mean_overlap(layers), "overlap of methods")}</div>',
            )
        )
    if any(layer.size is not None for layer in layers):
        anchored = (
            " It is anchored, so it is subtracted at first." if metadata.get("anchored") else ""
        )
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
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _head(layers: Sequence[LayerReport], metadata: Mapping[str, Any], title: str, rank: int) -> str:
    facts = {
        "layers": f"{len(layers)}",
        "sequences": _count(metadata.get("sequences")),
        "label tokens": _count(metadata.get("label_tokens")),
        "positions": _count(max((layer.positions for layer in layers), default=0)),
        "mask": str(metadata.get("token_mask", "–")),
        "loss": str(metadata.get("loss_reduction", "–")),
        "rank": str(rank),
        "lorainit": __version__,
    }
    cells = "".join(
        f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items()
    )
    return f'<h1>{escape(title)}</h1><dl class="facts">{cells}</dl>'


def _count(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else "–"


def _advice(layers: Sequence[LayerReport], metadata: Mapping[str, Any]) -> str:
    items = "".join(
        f'<li class="{kind}">{escape(text)}</li>' for kind, text in advice(layers, metadata)
    )
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
            text = f"{value:.0%}" if percent else f"{value:.2g}"
            values[layer.depth, layer.projection] = (
                min(1.0, value / top), text, f"{layer.name}: {text}"
            )  # fmt: skip
    drawn = heat_map(values, _columns(layers), "share by depth and projection")
    return f'<div class="card fit">{drawn}</div>'


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
        f"<td>{cell(layer.size, '.2g')}</td></tr>"
        for layer in layers
    )
    return (
        "<h2>Every layer</h2><details><summary>the numbers</summary>"
        '<div class="scroll"><table><thead><tr><th>layer</th><th>out × in</th><th>rank</th>'
        "<th>|G|²</th><th>kept</th><th>effective directions</th><th>positions</th>"
        f"<th>|s B A| / |W|</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
