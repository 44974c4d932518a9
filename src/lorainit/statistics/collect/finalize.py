"""From one pass's sums to statistics: added over the processes, checked, and handed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from lorainit.errors import DataError, NonFiniteError, TargetError
from lorainit.linalg import all_finite
from lorainit.parallel import collectives
from lorainit.statistics.collect.passes import Run
from lorainit.statistics.collect.reduction import reduce_layers
from lorainit.statistics.loss.batch_loss import ALL_MASKED
from lorainit.statistics.settings import Subject
from lorainit.statistics.store.partition import Shares
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import LayerStatistics


def finish(run: Run, subject: Subject, population: float | None, *, whole: bool) -> Statistics:
    """Reduce over processes, check, and hand over; `whole`: there is no other pass.

    Raises:
        NonFiniteError: no loss, or not all of the sums, are finite.
        DataError: no label counts.
        TargetError: layers that did not run, where that is not allowed.
        ProcessError: any of these on another process.
    """
    state, settings = run.state, subject.settings
    sequences, tokens, skipped = collectives.sum_counts(
        [run.sequences, run.label_tokens, run.skipped]
    )
    if sequences == 0 and skipped:
        raise NonFiniteError(
            f"the loss of every sequence is not finite ({int(skipped)} skipped). Load the model in "
            "bfloat16 or float32, and look at the data."
        )
    if state.backward and tokens == 0:
        raise DataError(ALL_MASKED)
    owners = reduce_layers(state.layers, subject.device, gather=subject.gather)
    rank, size = collectives.world()
    layers: dict[str, LayerStatistics] = {}
    for name, sums in state.layers.items():
        if name not in owners or not (subject.gather or owners[name] == rank):
            continue
        layers[name] = sums.finish(
            sequences=sequences,
            label_tokens=tokens,
            loss_reduction=settings.loss_reduction,
            loss_scale=run.loss_scale,
            population=population,
        )
    unused = [name for name in state.layers if name not in owners]
    if owners or whole:
        check_unused(unused, owners, subject)
    with collectives.shared_errors():
        _check_layers(layers)
    metadata: dict[str, Any] = {
        "needs": sorted(subject.needs),
        "token_mask": settings.token_mask,
        "loss_reduction": settings.loss_reduction,
        "gradient_dtype": settings.gradient_dtype,
        "sequences": sequences,
        "label_tokens": tokens,
        "skipped_sequences": skipped,
        "population": population,
        "unused": unused,
    }
    shares = None if subject.gather or size == 1 else Shares(owners, rank, size)
    return Statistics(layers, metadata, shares=shares)


def check_unused(unused: list[str], reached: Collection[str], subject: Subject) -> None:
    """Raise if no layer ran, or if not all did and that is not allowed."""
    if not unused:
        return
    if not reached:
        raise TargetError(
            f"none of the {len(unused)} target layers ran in the forward pass, or the loss does not depend "
            f"on them (first: '{unused[0]}'). Check that the batches reach this part of the model."
        )
    if subject.settings.on_unused == "raise":
        shown = ", ".join(f"'{n}'" for n in unused[:5]) + (", ..." if len(unused) > 5 else "")
        raise TargetError(
            f"{len(unused)} target layer(s) never ran, or got no gradient: {shown}. Give data that "
            "reaches them (experts: more sequences, of more kinds), leave them out with "
            "exclude_modules, or pass on_unused='default' to start them as PEFT does."
        )


def _check_layers(layers: Mapping[str, LayerStatistics]) -> None:
    """Name the first layer whose sums are not finite."""
    checked: dict[int, Tensor] = {}
    for layer in layers.values():
        for field in LayerStatistics.TENSORS:
            tensor = getattr(layer, field)
            if tensor is not None and id(tensor) not in checked:
                checked[id(tensor)] = all_finite(tensor)
    # All are asked before the first is waited for.
    finite = {key: bool(flag) for key, flag in checked.items()}
    for name, layer in layers.items():
        for field in LayerStatistics.TENSORS:
            tensor = getattr(layer, field)
            if tensor is not None and not finite[id(tensor)]:
                raise NonFiniteError(
                    f"layer '{name}': {field} is not finite. Its activations or gradients "
                    "overflow in "
                    "the model's dtype: load the model in bfloat16 or float32."
                )
