"""Sections of the page that have a figure or a table of their own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lorainit.report.curves import Curve
from lorainit.report.drawing import COLOURS, DRAWN_LAYERS, chart, spectra
from lorainit.report.maps import sample_map, share_map
from lorainit.report.measure import LayerReport
from lorainit.report.quantization import describe, in_words
from lorainit.report.rate_curve import RateCurve, drawn
from lorainit.report.start_loss import StartLoss


def section(title: str, text: str, body: str, lead: str = "") -> str:
    """A heading, one sentence to act on where there is one, what the figure shows, and the figure."""
    first = f"<p>{escape(lead)}</p>" if lead else ""
    return f'<h2>{escape(title)}</h2>{first}<p class="soft">{escape(text)}</p>{body}'


def start_section(loss: StartLoss | None) -> str:
    """The base model's loss, and the one with the adapter."""
    if loss is None:
        return ""
    gone = "" if loss.gone is None or loss.change >= 0 else f"{loss.gone:.0%}"
    rows = (
        ("the base model", loss.base, "", ""),
        ("with the adapter", loss.start, _signed(loss.change), gone),
    )
    body = "".join(
        f"<tr><td>{name}</td><td>{value:.4f}</td><td>{change}</td><td>{share}</td></tr>"
        for name, value, change, share in rows
    )
    return section(
        "The loss at the start",
        f"Loss of a label token. Measured on {loss.on}.",
        '<div class="card fit"><div class="scroll"><table class="plain"><thead><tr><th></th>'
        "<th>loss</th><th>change</th><th>share gone</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></div>",
    )


def _signed(change: float) -> str:
    return f"{change:+.3g}".replace("-", "−") if change else "none"


def rates_section(rates: Sequence[RateCurve]) -> str:
    """What the suggested rate rests on, and what training ended at."""
    if not rates:
        return ""
    return section(
        "The learning rate",
        "Loss by rate, on records that are not trained on; the suggested rate dashed, its range shaded. "
        "A run of many steps is trained best near the rate that suits its first two steps.",
        drawn(rates),
    )


def curves_section(curves: Sequence[Curve]) -> str:
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
    return section(
        "Learning curves",
        "Long lines are faint, with their moving mean strong." + more,
        f'<div class="legend">{legend}</div><div class="grid2">{cards}</div>',
    )


def quantization_sections(layers: Sequence[LayerReport]) -> list[str]:
    """What quantization took from every layer, and what the adapter gives back of it."""
    adapter = any(layer.size is not None for layer in layers)
    losses = {x.name: x.quantization for x in layers if x.quantization is not None}
    if not losses:
        return []
    took = share_map(
        layers,
        lambda layer: None if layer.quantization is None else layer.quantization.of_outputs,
        tip_of=lambda layer: describe(losses[layer.name]),
        title="taken",
    )
    text = (
        "Of each layer's outputs on the data, in their norm: E = W − Q is what rounding took from the weight, "
        "|E Sx^½| / |W Sx^½| its share of the outputs."
    )
    back = ""
    if any(loss.given_back is not None for loss in losses.values()):
        text += (
            " Given back is 1 − |(E − s B A) Sx^½| / |E Sx^½|: at 100% a layer's outputs are those of full "
            "precision. What the adapter does for the task counts against it here."
        )
        back = share_map(
            layers,
            lambda layer: None if layer.quantization is None else layer.quantization.given_back,
            top=1.0,
            tip_of=lambda layer: describe(losses[layer.name]),
            title="given back",
        )
    body = f'<div class="pair">{took}{back}</div>'
    lead = in_words(losses, adapter=adapter)
    return [section("What quantization took", text, body, lead)]


def sample_sections(layers: Sequence[LayerReport]) -> list[str]:
    """How much the sample says about the inputs."""
    drawn = sample_map(layers)
    if not drawn:
        return []
    ratio = min(layer.positions / layer.shape[1] for layer in layers)
    text = (
        "Effective directions of the inputs, (Σλ)² / Σλ²: few where a token or a feature outshines "
        f"all others. There are at least {ratio:.1f} counted positions for each input dimension; below "
        "1 damping fills the rest."
    )
    return [section("Is the sample large enough?", text, drawn)]


def _drawn(layers: Sequence[LayerReport]) -> str:
    """Which layers have a line of their own."""
    if len(layers) <= DRAWN_LAYERS:
        return "every layer"
    return f"{DRAWN_LAYERS} of {len(layers)} layers, spread evenly,"


def spectra_section(layers: Sequence[LayerReport], rank: int) -> str:
    """Inputs, output gradients and the whitened gradient, with the rank marked."""
    kinds = (
        ("Inputs, Sx", [layer.input_spectrum for layer in layers]),
        ("Output gradients, Sy", [layer.output_spectrum for layer in layers]),
        ("Whitened gradient", [layer.signal for layer in layers]),
    )
    cards = "".join(
        f'<div class="card"><h3>{name}</h3>{spectra(lines, rank, name)}</div>'
        for name, lines in kinds
    )
    return section(
        "Spectra",
        f"Share of each direction, largest first; {_drawn(layers)} faint, the median of all strong, "
        "the rank dashed. A steep fall before the rank: a lower one would do.",
        f'<div class="grid3">{cards}</div>',
    )
