"""One pass over a few batches, or more where memory asks for it, give every layer's statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorainit.errors import DataError
from lorainit.statistics import distributed
from lorainit.statistics.anatomy import input_device
from lorainit.statistics.finishing import check_unused, finish
from lorainit.statistics.guard import measuring, unchanged_rng
from lorainit.statistics.losses import ALL_MASKED, LossFunction, has_label
from lorainit.statistics.plan import Plan
from lorainit.statistics.planning import plan_passes
from lorainit.statistics.rounds import sample, shared_population
from lorainit.statistics.running import run_batches
from lorainit.statistics.settings import CollectSettings, Subject
from lorainit.statistics.store import Statistics
from lorainit.types import GRADIENT_STATISTICS

logger = logging.getLogger("lorainit")


def collect(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Any],
    settings: CollectSettings,
    loss_fn: LossFunction | None = None,
    *,
    population: float | None = None,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Statistics:
    """Collect the statistics of `modules` (base layers by target name) from `data`.

    `population` is the size of the fine-tuning set, where `data` does not know it; the passes run inside
    the context that `beside` gives once they are planned.

    Hooks are gone, and ``requires_grad``, modes, ``.grad`` and the random state are as they were,
    when this returns or raises.
    """
    with unchanged_rng(input_device(model)):
        prepared = prepare(model, modules, data, settings, loss_fn, population=population)
        parts = []
        with beside():
            for part in prepared.parts():
                # What is kept of one pass makes room for the next.
                parts.append(part.to("cpu") if len(prepared.plan.passes) > 1 else part)
                del part
    return _merged(parts, modules, settings)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Batches and a plan: everything that can be known before the passes."""

    subject: Subject
    batches: list[dict[str, Any]]
    population: float | None
    plan: Plan

    def parts(self) -> Iterator[Statistics]:
        """Each pass's statistics, in the layers' order; a pass begins when its part is asked for."""
        for group in self.plan.passes:
            # Held by nobody here: the next pass needs the memory of what was handed over.
            yield self._part(group)

    def _part(self, group: Collection[str]) -> Statistics:
        some = {name: self.subject.modules[name] for name in group}
        subject = replace(self.subject, modules=some)
        with measuring(subject.model):
            run = run_batches(subject, self.batches, self.plan.batch.rows)
        return finish(run, subject, self.population, whole=len(self.plan.passes) == 1)


def prepare(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Any],
    settings: CollectSettings,
    loss_fn: LossFunction | None = None,
    *,
    population: float | None = None,
) -> Prepared:
    """Check the data and plan the passes; the random state may be drawn from."""
    subject = Subject(model, modules, settings, loss_fn)
    if settings.gradient_dtype == "bfloat16" and settings.needs >= {
        "gradient",
        "input_second_moment",
    }:
        logger.warning(
            "gradient_dtype='bfloat16' rounds the gradient's sum, and a method that divides it by the inputs' "
            "second moment makes that rounding large where the data hardly go: it is meant for LoRA-GA and "
            "LoRA-One. Leave it at 'float32' here, or give few large batches."
        )
    population = shared_population(data) if population is None else population
    batches = sample(data, settings.max_sequences)
    if loss_fn is None and settings.needs & GRADIENT_STATISTICS:
        _check_labels(model, batches)
    plan = plan_passes(subject, batches)
    logger.info(str(plan))
    return Prepared(subject, batches, population, plan)


def _check_labels(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    """Every batch has labels, and not all of them are masked: known before any long work."""
    with distributed.together():
        labelled = [has_label(model, batch) for batch in batches]
    if not distributed.anywhere(any(labelled)):
        raise DataError(ALL_MASKED)


def _merged(
    parts: list[Statistics], modules: Mapping[str, nn.Module], settings: CollectSettings
) -> Statistics:
    """The passes' statistics as one, in the targets' order."""
    if len(parts) == 1:
        return parts[0]
    layers = {name: part[name] for part in parts for name in part}
    metadata = dict(parts[0].metadata)
    metadata["unused"] = [name for part in parts for name in part.metadata["unused"]]
    some = [part.shares for part in parts if part.shares is not None]
    owners = {name: owner for shares in some for name, owner in shares.owners.items()}
    check_unused(metadata["unused"], [n for part in parts for n in part.names], settings)
    return Statistics(
        {name: layers[name] for name in modules if name in layers},
        metadata,
        shares=replace(some[0], owners={n: owners[n] for n in modules if n in owners})
        if some
        else None,
    )
