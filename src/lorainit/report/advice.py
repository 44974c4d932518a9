"""What to do, in words, from the numbers of the layers."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from typing import Any

from lorainit.report.measure import LayerReport
from lorainit.report.predicted_decrease import StartLoss, total


def advice(
    layers: Sequence[LayerReport],
    metadata: Mapping[str, Any],
    *,
    anchored: bool = False,
    loss: StartLoss | None = None,
    rate: Mapping[str, float] | None = None,
) -> list[tuple[str, str]]:
    """Sentences with their weight: ``"warn"``, ``"note"`` or ``"good"``.

    Args:
        layers: what was measured of each.
        metadata: of the statistics.
        anchored: whether the adapter's start is subtracted, so that its size moves nothing at first.
        loss: before and after the start, where it was measured.
        rate: what the adapter's record holds of a suggested learning rate.
    """
    found: list[tuple[str, str]] = []
    if rate and "learning_rate" in rate:
        found.append(
            (
                "note",
                f"Train at a learning rate of {rate['learning_rate']:.2g}, measured for this start (AdamW with "
                f"warmup and decay). To look further, try {rate['learning_rate_low']:.1g} and "
                f"{rate['learning_rate_high']:.1g}.",
            )
        )
    found += _sample(layers, metadata)
    found += _rank(layers)
    if not anchored:
        found += _sizes(layers)
    if loss is not None:
        found += _loss(layers, loss, anchored=anchored)
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


def _loss(
    layers: Sequence[LayerReport], loss: StartLoss, *, anchored: bool
) -> list[tuple[str, str]]:
    change = loss.start - loss.base
    if anchored or abs(change) < 1e-4 * abs(loss.base):
        return [("good", f"The adapter starts at the base model's loss, {loss.base:.4g}.")]
    if change > 0:
        return [
            (
                "warn",
                f"The start raises the loss from {loss.base:.4g} to {loss.start:.4g}. Let its length be "
                "measured (Natural with data), lower lora_alpha, or collect more sequences of the "
                "data that you train on.",
            )
        ]
    text = f"The start lowers the loss from {loss.base:.4g} to {loss.start:.4g}"
    promised = total({x.name: x.promise for x in layers if x.promise is not None}).slope
    if promised < 0:
        kept = change / promised
        text += f", {kept:.0%} of what the gradient's slope promises"
        if kept < 0.1:
            text += ". That is little: the step is too long, or the sample is unlike these records"
            return [("note", text + ".")]
    return [("good", text + ".")]


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
