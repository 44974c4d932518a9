"""What to do, in words, from the numbers of the layers."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from typing import Any

from lorainit.report.measure import LayerReport


def advice(layers: Sequence[LayerReport], metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sentences with their weight: ``"warn"``, ``"note"`` or ``"good"``."""
    found: list[tuple[str, str]] = []
    found += _sample(layers, metadata)
    found += _rank(layers)
    if not metadata.get("anchored"):
        found += _sizes(layers)
    unused = metadata.get("unused") or []
    if unused:
        found.append(
            ("warn", f"{len(unused)} layers were reached by no sequence: {_names(unused)}.")
        )
    return found or [("good", "Nothing stands out.")]


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
    thin = [layer for layer in layers if layer.directions and layer.directions < layer.rank]
    if thin:
        found.append(
            (
                "note",
                f"{len(thin)} layers have inputs in fewer effective directions than the rank, as those of "
                f"{thin[0].name} ({thin[0].directions:.1f}). A few directions hold nearly all the energy; "
                "if that is the first token's, try the mask 'labels'.",
            )
        )
    return found


def _rank(layers: Sequence[LayerReport]) -> list[tuple[str, str]]:
    kept = [layer for layer in layers if layer.kept is not None]
    if not kept:
        return []
    median = stats.median(float(layer.kept or 0) for layer in kept)
    text = f"At this rank the median layer keeps {median:.0%} of the whitened gradient's energy."
    low = sorted(kept, key=lambda layer: float(layer.kept or 0))[:3]
    if median < 0.5:
        text += " A higher rank would keep more; the layers that lose most are "
        return [("note", text + _names([layer.name for layer in low]) + ".")]
    if float(low[0].kept or 0) < 0.5 * median:
        text += f" Raise it (rank_pattern) for {_names([layer.name for layer in low])}."
        return [("note", text)]
    return [("good", text)]


def _sizes(layers: Sequence[LayerReport]) -> list[tuple[str, str]]:
    sizes = {layer.name: layer.size for layer in layers if layer.size}
    if not sizes:
        return []
    median, largest = stats.median(sizes.values()), max(sizes, key=lambda n: sizes[n] or 0.0)
    text = (
        f"The adapter's |s B A| / |W| is {median:.2g} in the median layer, {sizes[largest]:.2g} at most "
        f"({largest})."
    )
    if (sizes[largest] or 0.0) > 0.5:
        text += (
            " That is a long first step: look at the loss before training, and "
            "try a third of your usual learning rate too."
        )
        return [("warn", text)]
    if median > 0.02:
        return [("note", text + " Try learning rates from a third of your usual one up to it.")]
    return [("good", text + " Small: your usual learning rate and up to three times it.")]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
