"""What else stands out in the numbers of the layers: the sample, the sizes, layers that were not reached."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from typing import Any

from lorainit.report.measure import LayerReport


def cautions(
    layers: Sequence[LayerReport],
    metadata: Mapping[str, Any],
    *,
    anchored: bool = False,
    rate_known: bool = False,
) -> list[tuple[str, str]]:
    """Sentences with their weight: ``"warn"``, ``"note"`` or ``"good"``.

    Args:
        layers: what was measured of each.
        metadata: of the statistics.
        anchored: whether the adapter's start is subtracted, so that its size moves nothing at first.
        rate_known: whether a rate was measured for the adapter; its size says nothing of rates then.
    """
    found = _sample(layers, metadata)
    if not anchored:
        found += _sizes(layers, rate_known=rate_known)
    unused = metadata.get("unused") or []
    if unused:
        found.append(
            ("warn", f"{len(unused)} layers were reached by no sequence: {_names(unused)}.")
        )
    return found


def _sample(layers: Sequence[LayerReport], metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    sequences = metadata.get("sequences")
    if isinstance(sequences, int | float) and sequences < 64:
        found.append(
            (
                "warn",
                f"Only {sequences:.0f} sequences: the gradient is noisy. Collect 256 if there are as many.",
            )
        )
    short = [layer for layer in layers if 0 < layer.positions < layer.shape[1]]
    if short:
        worst = min(short, key=lambda layer: layer.positions / layer.shape[1])
        found.append(
            (
                "warn",
                f"{len(short)} of {len(layers)} layers have fewer counted positions than input dimensions "
                f"({worst.name}: {worst.positions:.0f} for {worst.shape[1]}), so their second moment is "
                "singular and damping fills the rest. Collect more sequences, or raise damping above 0.1.",
            )
        )
    labels_only = metadata.get("token_mask") == "labels"
    thin = [layer for layer in layers if layer.directions and layer.directions < layer.rank]
    if thin:
        found.append(
            (
                "note",
                f"{len(thin)} of {len(layers)} layers have inputs in fewer effective directions than the "
                f"rank, as those of {thin[0].name} ({thin[0].directions:.1f}). A few directions hold "
                "nearly all the energy"
                + (
                    "." if labels_only else "; if that is the first token's, try the mask 'labels'."
                ),
            )
        )
    return found


def _sizes(layers: Sequence[LayerReport], *, rate_known: bool) -> list[tuple[str, str]]:
    sizes = {layer.name: layer.size for layer in layers if layer.size}
    if not sizes:
        return []
    median, largest = stats.median(sizes.values()), max(sizes, key=lambda n: sizes[n] or 0.0)
    text = (
        f"The adapter's |s B A| / |W| is {median:.2g} in the median layer, {sizes[largest]:.2g} at most "
        f"({largest})."
    )
    if (sizes[largest] or 0.0) > 0.5:
        rates = "" if rate_known else ", and try a third of your usual learning rate too"
        text += f" That is a long first step: look at the loss before training{rates}."
        return [("warn", text)]
    if median > 0.02:
        rates = "" if rate_known else " Try learning rates from a third of your usual one up to it."
        return [("note", text + rates)]
    rates = "" if rate_known else " Small: your usual learning rate and up to three times it."
    return [("good", text + rates)]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
