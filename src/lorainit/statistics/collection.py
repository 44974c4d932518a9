"""One pass over a sample, or more where memory asks for it, give every layer's statistics."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lorainit.data.batch import Batch
from lorainit.data.sampling import Sample
from lorainit.errors import DataError
from lorainit.models.state import measuring, unchanged_rng
from lorainit.parallel import collectives
from lorainit.statistics.collect.finalize import check_unused, finish
from lorainit.statistics.collect.passes import run_batches
from lorainit.statistics.collect.unreached import unreached_reasons
from lorainit.statistics.loss.batch_loss import ALL_MASKED, has_label
from lorainit.statistics.memory.plan import Plan
from lorainit.statistics.memory.planner import plan_passes
from lorainit.statistics.settings import Subject
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import GRADIENT_STATISTICS

logger = logging.getLogger("lorainit")


def collect_layers(subject: Subject, sample: Sample) -> Statistics:
    """Collect the statistics of the subject's layers from a sample.

    Hooks are gone, and ``requires_grad``, modes, ``.grad`` and the random state are as they were,
    when this returns or raises.
    """
    with unchanged_rng(subject.device):
        planned = plan_collection(subject, sample)
        parts = []
        for part in planned.parts():
            # What is kept of one pass makes room for the next.
            parts.append(part.to("cpu") if len(planned.plan.passes) > 1 else part)
            del part
    return _merged(parts, subject)


@dataclass(frozen=True, eq=False)
class PlannedCollection:
    """A sample and a plan: everything that can be known before the passes."""

    subject: Subject
    sample: Sample
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
            run = run_batches(subject, self.sample.batches, self.plan.batch.rows)
            found = finish(run, subject, self.sample.population, whole=len(self.plan.passes) == 1)
            found.metadata["unused_reasons"] = unreached_reasons(
                found.metadata["unused"], run.state.ran, subject, self.sample.batches
            )
        return found


def plan_collection(subject: Subject, sample: Sample) -> PlannedCollection:
    """Check the sample and plan the passes; the random state may be drawn from."""
    settings = subject.settings
    if settings.gradient_dtype == "bfloat16" and subject.needs >= {
        "gradient",
        "input_second_moment",
    }:
        logger.warning(
            "gradient_dtype='bfloat16' rounds the gradient's sum, and a method that divides it by the inputs' "
            "second moment makes that rounding large where the data hardly go: it is meant for LoRA-GA and "
            "LoRA-One. Leave it at 'float32' here, or give few large batches."
        )
    if settings.loss_fn is None and subject.needs & GRADIENT_STATISTICS:
        _check_labels(subject.model, sample.batches)
    plan = plan_passes(subject, sample.batches)
    logger.info(str(plan))
    return PlannedCollection(subject, sample, plan)


def _check_labels(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Every batch has labels, and not all of them are masked: known before any long work."""
    with collectives.shared_errors():
        labelled = [has_label(model, batch.content) for batch in batches]
    if not collectives.any_process(any(labelled)):
        raise DataError(ALL_MASKED)


def _merged(parts: list[Statistics], subject: Subject) -> Statistics:
    """The passes' statistics as one, in the targets' order."""
    if len(parts) == 1:
        return parts[0]
    layers = {name: part[name] for part in parts for name in part}
    metadata = dict(parts[0].metadata)
    metadata["unused"] = [name for part in parts for name in part.metadata["unused"]]
    metadata["unused_reasons"] = {
        name: why for part in parts for name, why in part.metadata["unused_reasons"].items()
    }
    some = [part.shares for part in parts if part.shares is not None]
    owners = {name: owner for shares in some for name, owner in shares.owners.items()}
    check_unused(metadata["unused"], [n for part in parts for n in part.names], subject)
    return Statistics(
        {name: layers[name] for name in subject.modules if name in layers},
        metadata,
        shares=replace(some[0], owners={n: owners[n] for n in subject.modules if n in owners})
        if some
        else None,
    )
