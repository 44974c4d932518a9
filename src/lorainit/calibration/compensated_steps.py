"""Steps that begin where what quantization took is given back, and what the start is where they do not pay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorainit.adapters.targets import Target
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.line_search import SearchResult
from lorainit.calibration.repeated_steps import RepeatedSteps
from lorainit.calibration.step_stack import ErrorOf
from lorainit.calibration.take_steps import take_steps
from lorainit.models.displacement import LowRank
from lorainit.statistics import Statistics
from lorainit.types import Factors, GivesBack, RefusesStart

logger = logging.getLogger("lorainit")


@dataclass(frozen=True, eq=False)
class CompensatedStart:
    """What was found.

    Attributes:
        factors: by layer.
        search: its first loss is that of the quantized base, its loss that of the start.
    """

    factors: dict[str, Factors]
    search: SearchResult


def compensated_steps(
    method: GivesBack,
    targets: Mapping[str, Target],
    held_out: Callable[[int], HeldOutLoss],
    collect_at: Callable[[int, Mapping[str, LowRank]], Statistics],
    errors: ErrorOf,
    at_base: Statistics,
    *,
    progress: bool = True,
) -> CompensatedStart | None:
    """Give back what quantization took, then take the method's steps from there.

    What is given back is closed-form; in which of the method's ways, and what part, is measured. It may
    raise the loss of a text that the full-precision model knows little of: the steps after it decide. The
    gradient at the base knows what quantization took, and a step along it would repair that a second
    time: so statistics are taken again where the compensated model is.

    Args:
        method: its settings.
        targets: layers by name.
        held_out: the loss on calibration sequences, by number of the step, from one.
        collect_at: statistics from the step's other sequences, at a displacement.
        errors: what quantization took from a layer.
        at_base: statistics at the base.
        progress: show a progress bar.

    Returns:
        The start: all steps; or, where the method refuses what they take of the loss, what was given back
        alone. None where it does not lower the loss on the held-back sequences.
    """
    steps = RepeatedSteps(method, targets)
    given = steps.give_back(at_base, held_out(1), errors)
    if given.length == 0:
        return None
    logger.info(
        "given back %.0f%% of what quantization took at this rank: loss %.4g to %.4g",
        100 * given.length,
        given.start_loss,
        given.loss,
    )
    compensated = steps.place()
    factors, found = take_steps(
        method, targets, held_out, collect_at, begun=steps, progress=progress
    )
    base, loss = given.start_loss, found.loss
    number = len(steps.searches)
    if number > 1:
        with held_out(number).measuring() as measure:
            base = measure({})
    refusal = method.refusal(found.gain) if isinstance(method, RefusesStart) else None
    if refusal is not None:
        logger.info(
            "the step after it would take %.1f%% of the loss away, %s: left out",
            100 * found.gain,
            refusal,
        )
        steps.go_back(compensated)
        factors, loss = steps.factors(), found.start_loss
    if not loss < base:
        logger.info("giving back what quantization took does not lower the loss: left out")
        return None
    return CompensatedStart(factors, SearchResult(given.length, loss, base, found.trials))
