"""The model's own loss, one sequence at a time, where the default loss is another.

The default loss is taken from the logits of a whole batch. It is that of most models, not of all: some do
not shift their labels, some have other heads (answer spans, transcripts, n-grams), some add the load
balancing of their routers. One sequence tells: its loss by both ways.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.data.batch import Batch
from lorainit.data.even_rounds import even_rounds
from lorainit.errors import DataError
from lorainit.linalg.dtypes import HALF
from lorainit.models.experts import routed
from lorainit.models.hooks import add_hook
from lorainit.models.introspection import accepts, innermost_model, input_device
from lorainit.models.state import measuring, unchanged_rng
from lorainit.parallel import collectives
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.loss.batch_loss import ALL_MASKED, batch_loss, has_label
from lorainit.types import IGNORED, LossReduction

logger = logging.getLogger("lorainit")

_TOLERANCE = 1e-3
"""Relative difference between two losses that are one."""

_TRIES = 3
"""Sequences that are tried until one has a loss that is finite."""

_REFUSALS = (
    AttributeError,
    DataError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a forward raises that cannot do with a batch; anything else is an accident, and goes its way."""

_TOLERANCE_IN_HALF = 1e-2
"""The same where a model rounds its loss to half precision."""


@dataclass(frozen=True)
class OwnLoss:
    """A loss function: the model's own loss of a batch of one sequence.

    Attributes:
        reduction: ``"sequence"``: as the model gives it; ``"token"``: times the number of labels.
    """

    reduction: LossReduction

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """``(1,)``, the loss of the one sequence.

        Raises:
            DataError: the model gives no loss; or ``"token"`` where the labels cannot be counted.
        """
        loss = own_loss(model, batch)
        if loss is None:
            raise DataError(
                f"{type(innermost_model(model)).__name__} gives no loss of a batch (keys: "
                f"{', '.join(map(str, batch))}). Add the labels that it wants, or pass loss_fn=..., a "
                "function of (model, batch) that returns one loss per sequence."
            )
        if self.reduction == "token":
            count = label_count(batch)
            if count is None:
                raise DataError(
                    "loss_reduction='token' weighs the model's own loss by the number of labels, which a "
                    f"batch (keys: {', '.join(map(str, batch))}) does not tell. Use 'sequence', or pass "
                    "loss_fn=..."
                )
            loss = loss * count
        return loss.reshape(1)


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The loss that the model gives of a batch, 0-dim with its graph; None where it gives none."""
    base = innermost_model(model)
    inputs = dict(batch)
    if accepts(base, "use_cache"):
        inputs.setdefault("use_cache", False)
    with _unchanged_problem_type(base):
        outputs = model(**inputs)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(outputs, tuple) and not hasattr(outputs, "_fields") and outputs:
        loss = outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    return loss.reshape(())


@contextlib.contextmanager
def _unchanged_problem_type(base: nn.Module) -> Iterator[None]:
    """A classifier of transformers writes into its configuration what its first labels look like."""
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "problem_type"):
        yield
        return
    before = config.problem_type
    try:
        yield
    finally:
        config.problem_type = before


def label_count(batch: Mapping[str, Any]) -> int | None:
    """How many labels a batch of one sequence has; None where there is no telling."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor):
        return 1 if labels.is_floating_point() else int((labels != IGNORED).sum())
    return 1 if isinstance(batch.get("start_positions"), Tensor) else None


def needs_own_loss(
    model: nn.Module,
    modules: Iterable[nn.Module],
    batches: Sequence[Batch],
    *,
    router_losses_alone: bool = False,
) -> bool:
    """Whether the model's own loss of a sequence is not the default one; the same on every process.

    The shortest sequence that has a label is run by both ways, in eval mode and without gradients; one
    line of the log says it where they differ. Models that give no loss have the default one, and those that
    add the loss of their routers to it have their own.

    Args:
        model: with its adapters switched off.
        modules: its target layers; experts among them run as they do when they are measured.
        batches: this process's.
        router_losses_alone: raise where the difference is not that of router losses.

    Raises:
        DataError: neither way gives a loss: the default one's reason.
        ProcessError: the same on another process.
    """
    device, sharded = input_device(model), is_sharded(model)
    with collectives.shared_errors():
        _check_presence(model, batches)
        alone = _shortest(model, batches, most=1 if sharded else _TRIES)
    rows = even_rounds(alone, sharded=sharded)
    different: list[str] = []
    with collectives.shared_errors(), measuring(model), routed(modules), torch.no_grad():
        for row in rows:
            found = _difference(model, row.to(device).content, device)
            if found and row.counts:
                different.append(found)
            if found is not None:
                break
    if different:
        logger.warning(
            "the default loss is not that of %s (%s): the model's own is taken, one sequence at a time",
            type(innermost_model(model)).__name__,
            different[0],
        )
    own = collectives.any_process(bool(different))
    if own and router_losses_alone and not _adds_router_losses(model):
        raise DataError(
            "token_mask='labels' counts the positions that predict a label one step ahead, and "
            f"{type(innermost_model(model)).__name__} takes its loss another way. Use "
            "token_mask='attention'."
        )
    return own


def one_by_one(batches: Sequence[Batch]) -> list[Batch]:
    """The sequences that have a label, each a batch.

    Raises:
        DataError: sequences that cannot run apart, or none with a label.
        ProcessError: the same on another process.
    """
    found: list[Batch] = []
    with collectives.shared_errors():
        for batch in batches:
            if max(batch.unit_sequences) > 1:
                raise DataError(
                    f"the model's own loss is a mean over batch {batch.index}, whose {batch.sequences} "
                    "sequences cannot run apart. Give batches of one sequence, or pass loss_fn=..., a "
                    "function of (model, batch) that returns one loss per sequence."
                )
            units = range(batch.units)
            alone = (batch.take([unit == own for unit in units]) for own in units)
            found += [part for parts in alone for part in parts if label_count(part.content) != 0]
    if not collectives.any_process(bool(found)):
        raise DataError(ALL_MASKED)
    return found


def _difference(model: nn.Module, content: Mapping[str, Any], device: torch.device) -> str | None:
    """How the two losses of one sequence differ, in words; empty: they do not; None: no telling."""
    refusal: Exception | None = None
    with _logits_of(model) as logits:
        try:
            with unchanged_rng(device):
                has_label(model, content)
                result = batch_loss(model, content, "token")
        except torch.OutOfMemoryError:
            # The pass says what there was no memory for.
            return ""
        except _REFUSALS as error:
            refusal = error
        own = _tried(model, content, device)
    if refusal is not None:
        if isinstance(refusal, DataError) and own is None:
            raise refusal
        if own is None:
            # Hooks of the user's own may need a gradient: the pass will tell.
            return ""
        return f"{type(refusal).__name__} against {own:.6g} on one sequence"
    if own is None:
        return ""
    if _adds_router_losses(model):
        return "it adds its routers' loss"
    tolerance = _TOLERANCE_IN_HALF if own.dtype in HALF else _TOLERANCE
    default = float(result.per_sequence.sum()) / max(int(result.label_tokens), 1)
    value = float(own)
    if not (math.isfinite(value) and math.isfinite(default)):
        return None
    if abs(value - default) > tolerance * max(abs(value), abs(default)):
        return f"{default:.6g} against {value:.6g} on one sequence"
    # Of a model that has learned nothing all losses are alike, whatever goes in.
    if len(logits) == 2 and logits[0].shape == logits[1].shape:
        first, second = (some.float() for some in logits)
        if (first - second).norm() > max(tolerance, _TOLERANCE_IN_HALF) * second.norm():
            return "it makes other inputs of its labels"
    return ""


@contextlib.contextmanager
def _logits_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """The logits of every forward inside."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            found.append(logits.detach())

    with contextlib.ExitStack() as stack:
        add_hook(stack, innermost_model(model).register_forward_hook, keep)
        yield found


def _tried(model: nn.Module, content: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """The model's own loss; None where it has none, or refuses the batch with its labels."""
    try:
        with unchanged_rng(device):
            return own_loss(model, content)
    except _REFUSALS as error:
        logger.debug("the model's own loss could not be taken: %s", error)
        return None


def _adds_router_losses(model: nn.Module) -> bool:
    """Whether the model's configuration asks for the load-balancing loss of its routers."""
    config = getattr(innermost_model(model), "config", None)
    text = getattr(config, "text_config", None)
    return any(getattr(part, "output_router_logits", False) is True for part in (config, text))


def _check_presence(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Where some batches have labels and others do not, that is known before any work."""
    lacking = [b for b in batches if not isinstance(b.content.get("labels"), Tensor)]
    if lacking and len(lacking) < len(batches):
        has_label(model, lacking[0].content)


def _shortest(model: nn.Module, batches: Sequence[Batch], most: int) -> list[Batch]:
    """The shortest sequences with a label, each a batch; a batch as a whole where none can run apart."""
    found: list[Batch] = []
    for batch in sorted(batches, key=lambda b: b.positions / max(1, b.rows)):
        if max(batch.unit_sequences) > 1 and batch.sequences != batch.rows:
            # The model's own mean over a packed row counts across its sequences.
            continue
        for unit in range(batch.units):
            parts = batch.take([unit == own for own in range(batch.units)])
            found += [part for part in parts if _labelled(model, part.content)]
            if len(found) >= most:
                return found[:most]
    return found


def _labelled(model: nn.Module, content: Mapping[str, Any]) -> bool:
    labels = content.get("labels")
    if not isinstance(labels, Tensor):
        return True
    return has_label(model, content) and label_count(content) != 0
