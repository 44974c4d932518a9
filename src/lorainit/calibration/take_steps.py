"""A method's steps in turn: collect, solve, measure, and collect again at the displaced point."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from lorainit.adapters.targets import Target
from lorainit.calibration import SearchResult
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.paired import gain
from lorainit.calibration.repeated_steps import RepeatedSteps
from lorainit.models.displacement import LowRank
from lorainit.statistics import Statistics
from lorainit.types import Factors, TakesSteps

logger = logging.getLogger("lorainit")


@contextlib.contextmanager
def _bar(method: TakesSteps, progress: bool) -> Iterator[Any]:
    total, name = method.steps, type(method).__name__
    with tqdm(total=total, desc=name, unit="step", disable=None if progress else True) as bar:
        yield bar


def take_steps(
    method: TakesSteps,
    targets: Mapping[str, Target],
    held_out: Callable[[int], HeldOutLoss],
    collect_at: Callable[[int, Mapping[str, LowRank]], Statistics],
    *,
    first: Statistics | None = None,
    parts: Iterable[Statistics] | None = None,
    max_memory: int | None = None,
    progress: bool = True,
    on_step: Callable[[int, dict[str, LowRank], SearchResult], None] | None = None,
) -> tuple[dict[str, Factors], SearchResult]:
    """`method.steps` steps, each measured; the start they lead to.

    Args:
        method: its settings.
        targets: layers by name.
        held_out: the loss on calibration sequences, by number of the step, from one.
        collect_at: statistics from the step's other sequences, at a displacement.
        first: statistics of the base model, where they are there already.
        parts: the same part by part, for a method that forgets them, see `RepeatedSteps.take_by_parts`.
        max_memory: what everything on a device may take, in bytes, where they come in parts.
        progress: show a progress bar.
        on_step: called after each step, with its number, the displacement and the search.

    Returns:
        Factors by layer; and the last search, its first loss that of the base model, on
        the same sequences. If that is lower, the factors are those there.
    """
    steps = RepeatedSteps(method, targets)
    number = 0
    with _bar(method, progress) as bar:
        for number in range(1, method.steps + 1):
            if number == 1 and parts is not None:
                result = steps.take_by_parts(parts, held_out(number), max_memory)
            else:
                at_first = number == 1 and first is not None
                statistics = first if at_first else collect_at(number, steps.present())
                assert statistics is not None
                result = steps.take(statistics, held_out(number))
            bar.set_postfix(loss=f"{result.loss:.4g}")
            bar.update()
            if on_step is not None:
                on_step(number, steps.present(), result)
            if result.length == 0:
                logger.info("step %d of %d found no way down; stopping", number, method.steps)
                break
    found = steps.searches[-1]
    if number > 1:
        with held_out(number).measuring() as loss:
            base = loss({})
            before = loss.latest
            loss(steps.present())
            whole = gain(before, loss.latest)
        # What a later step brings was not clear perhaps: the ones before it were.
        found = replace(found, gain_by_sequence=whole, unclear=None)
        if not found.loss < base:
            steps.go_back()
            found = replace(found, loss=base, length=0.0)
        found = replace(found, start_loss=base)
    return steps.factors(), found
