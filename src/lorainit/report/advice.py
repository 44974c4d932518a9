"""What to do: three sentences, on the learning rate, the rank and the method, and then what else stands out."""

from __future__ import annotations

import statistics as stats
from collections.abc import Mapping, Sequence
from typing import Any

from lorainit.adapters.origin import Origin
from lorainit.methods import METHODS
from lorainit.methods.auto import Auto
from lorainit.report.cautions import cautions
from lorainit.report.measure import LayerReport
from lorainit.report.start_loss import StartLoss

_FEW_HELD_BACK = 32
"""Below so many sequences a refusal may be for want of data."""

_ENOUGH = 0.5
"""A rank that keeps this share in the median layer is kept."""

_WORTH_DOUBLING = 0.1
"""What twice the rank has to keep in addition."""

_LEAST = Auto().least_gain
"""Share of the loss that a start has to take away to be worth it."""


def advice(
    layers: Sequence[LayerReport],
    metadata: Mapping[str, Any],
    *,
    rank: int,
    adapter: bool = False,
    origin: Origin | None = None,
    loss: StartLoss | None = None,
) -> list[tuple[str, str]]:
    """Sentences with their weight, ``"warn"``, ``"note"`` or ``"good"``.

    The first three are always there, in this order: one each on the learning rate, the rank and the method.

    Args:
        layers: what was measured of each.
        metadata: of the statistics.
        rank: that the configuration asks for.
        adapter: whether there is one.
        origin: how it was started, as its record has it.
        loss: before and after the start, where it was measured.
    """
    measured = {} if origin is None else origin.measured
    return [
        _rate(measured, adapter=adapter, matched=origin is not None and origin.resized != 1),
        _rank(layers, rank),
        _method(layers, origin, loss, adapter=adapter),
        *cautions(
            layers,
            metadata,
            anchored=origin is not None and origin.anchored,
            rate_known="learning_rate" in measured,
        ),
    ]


def _rate(
    measured: Mapping[str, float], *, adapter: bool, matched: bool = False
) -> tuple[str, str]:
    try:
        rate, low, high = (
            measured[f"learning_rate{end}"] for end in ("", "_low", "_high")
        )  # fmt: skip
    except KeyError:
        command = (
            "`lorainit.suggest_learning_rate(model, data)` measures one for it"
            if adapter
            else "`lorainit init` with `--data` measures one along with the start"
        )
        none = "none was suggested for this adapter" if adapter else "none was suggested yet"
        return "note", f"Rate: {none}; {command}, by two steps of Adam on 128 sequences."
    found = "the adapter was resized for" if matched else "was measured for this start"
    return "good", (
        f"Rate: train at a peak of {rate:.2g}, which {found} (AdamW with warmup and "
        f"decay); with time for more runs, also try {low:.1g} and {high:.1g}."
    )


def _rank(layers: Sequence[LayerReport], rank: int) -> tuple[str, str]:
    kept = [layer for layer in layers if layer.kept is not None]
    if not kept:
        return "note", (
            f"Rank: keep r = {rank} for now; what it keeps of the gradient is told by statistics of "
            "`lorainit collect --method natural`, or those that the report takes of `--data FILE`."
        )
    median = stats.median(float(layer.kept or 0) for layer in kept)
    doubled = stats.median(sum(layer.signal[: 2 * layer.rank]) for layer in kept)
    share = f"{median:.0%} of the whitened gradient's energy in the median layer"
    if median < _ENOUGH:
        if doubled - median >= _WORTH_DOUBLING:
            return "note", (
                f"Rank: raise it to r = {2 * rank} if memory allows, which holds {doubled:.0%} of the whitened "
                f"gradient's energy in the median layer where r = {rank} holds {median:.0%}."
            )
        return "good", (
            f"Rank: keep r = {rank}; it holds {share}, and twice the rank would add only "
            f"{100 * (doubled - median):.0f} points."
        )
    low = sorted(kept, key=lambda layer: float(layer.kept or 0))
    low = [layer for layer in low if float(layer.kept or 0) < 0.5 * median]
    if low:
        shown = low[:3]
        pattern = ", ".join(f'"{x.configured_name}": {2 * x.rank}' for x in shown)
        more = f" (and {len(low) - 3} more like them)" if len(low) > 3 else ""
        return "note", (
            f"Rank: keep r = {rank}, which holds {share}, and raise it where it holds less than half of that: "
            f"`rank_pattern={{{pattern}}}`{more}."
        )
    return "good", f"Rank: keep r = {rank}; it holds {share}."


def _method(
    layers: Sequence[LayerReport], origin: Origin | None, loss: StartLoss | None, *, adapter: bool
) -> tuple[str, str]:
    if not adapter:
        return "note", (
            "Method: nothing is started yet; `lorainit init --model MODEL --data FILE --output FOLDER` takes "
            f"Auto, which moves the model where that takes at least {_LEAST:.0%} of the loss away, and is "
            "plain LoRA where not."
        )
    name = "" if origin is None else str(origin.settings.get("method", ""))
    name = "" if name == "Vanilla" else name
    who = f"the start of {name}" if name else "this adapter"
    if origin is not None and "refused_loss" in origin.measured:
        return _refused(name, origin)
    if origin is not None and _left_to_heads(name, origin):
        before, after = (f"{origin.heads[f'loss_{end}']:.4g}" for end in ("before", "after"))
        return "good", (
            f"Method: keep the plain LoRA that {name} is beside the heads that it fitted first, which took the "
            f"loss from {before} to {after}; a step after that pays on some data alone (Natural takes it)."
        )
    sizes = [layer.size for layer in layers if layer.size is not None]
    anchored = origin is not None and origin.anchored
    if anchored or (sizes and not any(sizes)):
        return _unmoved(name, loss)
    if loss is None:
        return "note", (
            f"Method: what {who} takes off the loss was not measured; give `--data` with records that it "
            "was not started from, and keep it if the loss falls."
        )
    if not loss.moved:
        return "note", (
            f"Method: {who} takes nothing off the loss, {loss.base:.4g} on {loss.on}; take Auto, which is "
            "plain LoRA then, or give it more sequences."
        )
    if loss.change > 0:
        more = f", or give {name} more sequences of the data that you train on" if name else ""
        return "warn", (
            f"Method: {who} raises the loss from {loss.base:.4g} to {loss.start:.4g} on {loss.on}; take "
            f"Auto or plain LoRA{more}."
        )
    return _lowered(name, who, origin, loss)


def _left_to_heads(name: str, origin: Origin) -> bool:
    """Whether no step was taken because heads beside the adapter were fitted first."""
    kinds = {kind.__name__: kind for kind in METHODS.values()}
    leaves = hasattr(kinds.get(name), "beside_fitted_heads")
    return leaves and bool(origin.heads.get("fitted")) and "start_loss" not in origin.measured


def _unmoved(name: str, loss: StartLoss | None) -> tuple[str, str]:
    at = "" if loss is None else f", {loss.base:.4g}"
    if not name:
        return "note", (
            f"Method: plain LoRA starts at the base model's loss{at}; Auto, the default, measures whether a "
            "start from the data takes enough of it away."
        )
    return "good", (
        f"Method: {name} starts at the base model's loss{at}; whether it trains better than plain LoRA is "
        f"told by `lorainit compare --methods vanilla,{_command(name)}`."
    )


def _lowered(name: str, who: str, origin: Origin | None, loss: StartLoss) -> tuple[str, str]:
    share = f"{-loss.change:.3g}" if loss.gone is None else f"{loss.gone:.0%}"
    what = f"{who} takes {share} off the loss ({loss.base:.4g} to {loss.start:.4g} on {loss.on})"
    if loss.error is not None and -loss.change < 2 * loss.error:
        return "warn", (
            f"Method: {what}, which is within twice its standard error; give it more sequences, or take "
            "plain LoRA."
        )
    # A method that refuses a start which takes too little has judged this one.
    judged = (
        origin is not None
        and "base_loss" in origin.measured
        and float(origin.settings.get("least_gain", 0)) > 0
    )
    repairs = any(
        getattr(kind, "needs_reference", False)
        for kind in METHODS.values()
        if kind.__name__ == name
    )
    if not name or judged or repairs or loss.gone is None or loss.gone >= _LEAST:
        return "good", f"Method: keep it: {what}."
    return "note", (
        f"Method: {what}, which is little; take Auto, which stays plain LoRA below {_LEAST:.0%}, or give "
        f"{name} more sequences."
    )


def _refused(name: str, origin: Origin) -> tuple[str, str]:
    measured = origin.measured
    base, refused = measured["base_loss"], measured["refused_loss"]
    share = f"{1 - refused / base:.1%}" if base > 0 else f"{base - refused:.3g}"
    text = (
        f"Method: keep the plain LoRA that {name} chose: the start that it measured takes only {share} off the "
        f"loss, {base:.4g}"
    )
    count = measured.get("sequences")
    if count is not None and count < _FEW_HELD_BACK:
        text += f"; more data may change that, since only {count:.0f} sequences were held back to measure on"
        return "note", text + "."
    return "good", text + "."


def _command(name: str) -> str:
    """A method's name on the command line, by its class's."""
    return next((key for key, kind in METHODS.items() if kind.__name__ == name), name.lower())
