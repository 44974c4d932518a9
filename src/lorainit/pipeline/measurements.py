"""What can be measured of a model's target layers: statistics and losses, also where they are displaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import nn

from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Target, Targets
from lorainit.adapters.weights import fingerprints
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.data.reading import Reading
from lorainit.data.sampling import Sample, draw_sample
from lorainit.errors import AdapterError
from lorainit.models.displacement import LowRank, displaced
from lorainit.models.introspection import innermost_model, input_device
from lorainit.models.state import unchanged_rng
from lorainit.parallel import collectives
from lorainit.pipeline.checks import unused_targets
from lorainit.solve.directions import value_directions
from lorainit.solve.importance import ranks_by_importance
from lorainit.solve.ranks import allocate_ranks, rank_limits
from lorainit.statistics.collection import PlannedCollection, collect_layers, plan_collection
from lorainit.statistics.loss.own_loss import OwnLoss, needs_own_loss, one_by_one
from lorainit.statistics.loss.togetherness import labelled_units, losses_together
from lorainit.statistics.settings import CollectSettings, Subject
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import (
    GRADIENT_STATISTICS,
    KeepsParameters,
    LimitsRank,
    Method,
    RanksDirections,
    RanksLayers,
)


@dataclass(frozen=True, eq=False)
class Measurements:
    """A model and its targets, and how they are measured.

    Attributes:
        model: a base model, or a PeftModel whose adapters are switched off.
        targets: its target layers.
        needs: names of the statistics; empty where nothing is collected.
        settings: how they are collected.
        gather: give all layers' statistics to every process.
        reference: the weights that a quantized base was made from; None where no method reads them.
        with_ranks: the targets with other ranks, written into the configuration; None where ranks stay.
    """

    model: nn.Module
    targets: Targets
    needs: frozenset[str]
    settings: CollectSettings
    gather: bool = False
    reference: ReferenceWeights | None = None
    with_ranks: Callable[[Mapping[str, int]], Targets] | None = None

    @cached_property
    def subject(self) -> Subject:
        """The layers as statistics see them."""
        modules = {name: target.module for name, target in self.targets.layers.items()}
        return Subject(self.model, modules, self.needs, self.settings, self.gather)

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs."""
        return input_device(self.model)

    def unchanged_rng(self) -> contextlib.AbstractContextManager[None]:
        """Inside, random numbers may be drawn; afterwards the generators are as they were."""
        return unchanged_rng(self.device)

    def sample(self, data: object, times: int = 1) -> Sample:
        """This process's part of the data, kept: `times` as many sequences as the settings' cap."""
        model, loss_fn = self.model, self.settings.loss_fn
        config = getattr(innermost_model(model), "config", None)
        reading = Reading(config)
        if loss_fn is not None:
            reading = Reading(config, True, partial(losses_together, model, loss_fn))
        elif self.needs & GRADIENT_STATISTICS:
            reading = Reading(config, labelled=partial(labelled_units, model))
        most = self.settings.max_sequences
        return draw_sample(data, None if most is None else times * most, reading)

    def with_own_loss(self, sample: Sample) -> tuple[Measurements, Sample]:
        """The same with the model's own loss, one sequence at a time, where the default one is another."""
        settings = self.settings
        if settings.loss_fn is not None or not self.needs & GRADIENT_STATISTICS:
            return self, sample
        labels = settings.token_mask == "labels"
        modules = self.subject.modules.values()
        if not needs_own_loss(self.model, modules, sample.batches, router_losses_alone=labels):
            return self, sample
        settings = replace(settings, loss_fn=OwnLoss(settings.loss_reduction))
        return replace(self, settings=settings), sample.with_batches(one_by_one(sample.batches))

    def planned(self, sample: Sample, workspace: int = 0) -> PlannedCollection:
        """How statistics of the base model are going to be collected, in one part or several.

        Args:
            sample: of the data.
            workspace: bytes that the solve of a part takes beside it.
        """
        # Different weights are an error before long work.
        _ = self.fingerprints
        return plan_collection(self.subject, sample, workspace)

    def statistics(
        self,
        sample: Sample,
        at: Mapping[str, LowRank] | None = None,
        planned: PlannedCollection | None = None,
    ) -> Statistics:
        """Statistics of the base model, displaced by `at`, with its fingerprints; `planned` if they are."""
        known = self.fingerprints
        with displaced(self.subject.modules, at) if at else contextlib.nullcontext():
            found = collect_layers(self.subject, sample, planned)
        found.fingerprints = {n: known[n] for n in found.names if n in known}
        return found

    def held_out_loss(self, sample: Sample) -> HeldOutLoss:
        """The loss on these sequences."""
        return HeldOutLoss(self.subject, sample.batches)

    def served(self, unused: Mapping[str, str]) -> dict[str, Target]:
        """The targets that are not `unused`."""
        return {name: t for name, t in self.targets.layers.items() if name not in unused}

    def redistributes(self, method: Method) -> bool:
        """Whether the layers' ranks follow from all layers' statistics."""
        if isinstance(method, RanksLayers):
            return self.with_ranks is not None and method.redistributes
        return (
            self.with_ranks is not None and isinstance(method, RanksDirections) and method.rho > 1
        )

    def reallocated(self, method: Method, statistics: Statistics | None) -> Measurements:
        """The same, each layer at the rank that its directions deserve, where the method says so."""
        if statistics is None or not self.redistributes(method):
            return self
        assert self.with_ranks is not None
        served = self.served(unused_targets(statistics, self.targets))
        # The experts of one parameter have one rank: theirs stays.
        served = {name: target for name, target in served.items() if not target.is_expert}
        if isinstance(method, RanksLayers):
            ranks = ranks_by_importance(served, statistics, method)
            return replace(self, targets=self.with_ranks(ranks))
        assert isinstance(method, RanksDirections)
        configured = {name: target.spec.rank for name, target in served.items()}
        share = method.rank_factor if isinstance(method, LimitsRank) else 1
        possible = {
            n: min(t.spec.out_features, t.spec.in_features) // share for n, t in served.items()
        }
        limits = rank_limits(configured, possible, method.rho)
        values = value_directions(
            served, statistics, method, limits, self.settings.budget, self.reference
        )
        costs = None
        if isinstance(method, KeepsParameters) and method.keeps_parameters:
            costs = {n: t.spec.out_features + t.spec.in_features for n, t in served.items()}
        return replace(self, targets=self.with_ranks(allocate_ranks(values, configured, costs)))

    @cached_property
    def fingerprints(self) -> dict[str, torch.Tensor]:
        """Of all targets' weights, read once: no start changes them."""
        return self._fingerprints()

    def _fingerprints(self) -> dict[str, torch.Tensor]:
        """Of all targets' weights, which must be the same on every process."""
        with torch.no_grad(), collectives.shared_errors():
            found = fingerprints(self.subject.modules)
        if not collectives.equal_everywhere([f.tolist() for f in found.values()]):
            raise AdapterError(
                "the processes hold different base weights: their statistics cannot be added. Load "
                "the same checkpoint on all of them; under accelerate's FSDP, set "
                "fsdp_cpu_ram_efficient_loading to false, which leaves the weights of all processes "
                "but the first empty."
            )
        return found
