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
from lorainit.statistics.blocks.block_pass import BlockPass
from lorainit.statistics.blocks.calls import NotByBlocksError
from lorainit.statistics.collect.finalize import check_unused, finish
from lorainit.statistics.collect.passes import Run, run_batches
from lorainit.statistics.collect.unreached import unreached_reasons
from lorainit.statistics.loss.batch_loss import ALL_MASKED, has_label
from lorainit.statistics.memory.block_plan import BlockPlan
from lorainit.statistics.memory.plan import Plan
from lorainit.statistics.memory.planner import plan_passes
from lorainit.statistics.settings import Subject
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import GRADIENT_STATISTICS

logger = logging.getLogger("lorainit")


def collect_layers(
    subject: Subject, sample: Sample, planned: PlannedCollection | None = None
) -> Statistics:
    """Collect the statistics of the subject's layers from a sample, as `planned`, if that is known.

    Hooks are gone, and ``requires_grad``, modes, ``.grad`` and the random state are as they were,
    when this returns or raises.
    """
    with unchanged_rng(subject.device):
        planned = plan_collection(subject, sample) if planned is None else planned
        parts = []
        for part in planned.parts():
            # What is kept of one pass makes room for the next.
            parts.append(part.to("cpu") if planned.is_divided else part)
            del part
    return _merged(parts, subject)


@dataclass(frozen=True, eq=False)
class PlannedCollection:
    """A sample and a plan: everything that can be known before the passes."""

    subject: Subject
    sample: Sample
    plan: Plan
    blocks: BlockPlan | None = None

    @property
    def is_divided(self) -> bool:
        """Whether there may be more than one part."""
        return self.blocks is not None or len(self.plan.passes) > 1

    def parts(self) -> Iterator[Statistics]:
        """Each pass's statistics, or each block's; work on a part begins when it is asked for."""
        if self.blocks is not None:
            try:
                walk = self._begun(self.blocks)
            except NotByBlocksError as reason:
                logger.warning("not block by block after all: %s. %s", reason, self.plan)
            else:
                yield from self._by_blocks(walk, self.blocks)
                return
        for group in self.plan.passes:
            # Held by nobody here: the next pass needs the memory of what was handed over.
            yield self._part(group)

    def _begun(self, blocks: BlockPlan) -> BlockPass:
        """The forward pass over all batches."""
        parts = [part for batch in self.sample.batches for part in batch.cut(blocks.batch.rows)]
        room = None if blocks.on_host == 0 else blocks.on_device
        walk = BlockPass(self.subject, blocks.chain, parts, room)
        with measuring(self.subject.model, checkpoints=False):
            walk.forward()
        return walk

    def _by_blocks(self, walk: BlockPass, blocks: BlockPlan) -> Iterator[Statistics]:
        """From the last block to the first, then the layers outside of blocks."""
        places = [place for place, _ in blocks.groups]
        for number, (place, names) in enumerate(blocks.groups):
            with measuring(self.subject.model, checkpoints=False):
                run = walk.collect(place, names)
                if places[number + 1 : number + 2] != [place]:
                    walk.free(place)
                found = self._finished(run, names) if names else None
            del run
            if found is not None:
                yield found
            del found
        if blocks.chain.outside:
            with measuring(self.subject.model, checkpoints=False):
                found = self._finished(walk.outside(), blocks.chain.outside)
            yield found

    def _finished(self, run: Run, names: Collection[str]) -> Statistics:
        some = {name: self.subject.modules[name] for name in names}
        subject = replace(self.subject, modules=some)
        found = finish(run, subject, self.sample.population, whole=False)
        found.metadata["unused_reasons"] = unreached_reasons(
            found.metadata["unused"], run.state, subject, self.sample.batches
        )
        return found

    def _part(self, group: Collection[str]) -> Statistics:
        some = {name: self.subject.modules[name] for name in group}
        subject = replace(self.subject, modules=some)
        with measuring(subject.model):
            run = run_batches(subject, self.sample.batches, self.plan.batch.rows)
            found = finish(run, subject, self.sample.population, whole=len(self.plan.passes) == 1)
            found.metadata["unused_reasons"] = unreached_reasons(
                found.metadata["unused"], run.state, subject, self.sample.batches
            )
        return found


def plan_collection(subject: Subject, sample: Sample, workspace: int = 0) -> PlannedCollection:
    """Check the sample and plan the passes; the random state may be drawn from.

    Args:
        subject: what is measured.
        sample: the data.
        workspace: bytes that are wanted beside a part's statistics, to solve them.
    """
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
    chosen = plan_passes(subject, sample.batches, workspace)
    logger.info(str(chosen))
    return PlannedCollection(subject, sample, chosen.passes, chosen.blocks)


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
