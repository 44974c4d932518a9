"""From data or statistics to the start: solve, and measure its length where the method asks for it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lorainit.adapters.targets import Target, Targets
from lorainit.adapters.weights import fingerprints, read_weight
from lorainit.allocation import allocate_ranks, rank_limits
from lorainit.calibration import SearchResult
from lorainit.checks import UNUSED, unused_targets
from lorainit.chunks import solving_bytes
from lorainit.errors import AdapterError
from lorainit.methods.natural import Natural
from lorainit.methods.vanilla import Vanilla
from lorainit.probing import (
    UNMEASURED_SIZE,
    Probe,
    calibrate_factors,
    length_for,
    relative_sizes,
    scale_factors,
    weight_norms,
)
from lorainit.refinement import natural_start
from lorainit.solving import relative_size, solve_layers, value_directions
from lorainit.statistics import (
    CollectSettings,
    LossFunction,
    Statistics,
    check_unused,
    collect,
    distributed,
    prepare,
)
from lorainit.statistics.anatomy import input_device
from lorainit.statistics.batches import split_batches
from lorainit.statistics.displace import LowRank, displaced
from lorainit.statistics.footprint import held_bytes
from lorainit.statistics.plan import parse_bytes
from lorainit.statistics.rounds import rows_before, sample, shared_population
from lorainit.types import Factors, Method, RanksDirections

logger = logging.getLogger("lorainit")


@dataclass(frozen=True, eq=False)
class Start:
    """What was found for one adapter.

    Attributes:
        factors: by target name.
        sizes: ``|s B A| / |W|`` by target name.
        unused: targets that no sequence reached, with the reason.
        search: the last measurement of a length, if any.
        plain: whether it is plain LoRA, since the start that was measured takes too little of the loss
            away; there are no factors then, unless the adapter was there before.
    """

    factors: dict[str, Factors]
    sizes: dict[str, float]
    unused: dict[str, str]
    search: SearchResult | None
    plain: bool = False


@dataclass(frozen=True, eq=False)
class Measured:
    """A model whose targets can be measured: statistics and losses, also at a displacement."""

    model: nn.Module
    targets: Targets
    settings: CollectSettings | None
    loss_fn: LossFunction | None
    calibration_share: float
    progress: bool
    with_ranks: Callable[[Mapping[str, int]], Targets] | None = None
    beside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """What goes on while passes run, once they are planned."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Base layers by target name."""
        return {name: target.module for name, target in self.targets.layers.items()}

    @property
    def budget(self) -> int | None:
        """Bytes that everything on a device may take; None where the user did not say."""
        return None if self.settings is None else parse_bytes(self.settings.max_memory)

    def statistics(
        self,
        data: Iterable[Any],
        population: float | None = None,
        at: Mapping[str, LowRank] | None = None,
    ) -> Statistics:
        """Statistics of the base model, displaced by `at`, with its fingerprints."""
        assert self.settings is not None
        modules = self.modules
        known = self._fingerprints(modules)
        with displaced(modules, at) if at else contextlib.nullcontext():
            found = collect(
                self.model,
                modules,
                data,
                self.settings,
                self.loss_fn,
                population=population,
                beside=self.beside,
            )
        found.fingerprints = {name: known[name] for name in found.names}
        return found

    def passes(self, data: Iterable[Any]) -> Iterator[Statistics]:
        """The same pass by pass, for whoever needs no two passes' statistics at a time."""
        assert self.settings is not None
        self._fingerprints(self.modules)
        prepared = prepare(self.model, self.modules, data, self.settings, self.loss_fn)
        with self.beside():
            yield from prepared.parts()

    @staticmethod
    def _fingerprints(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Of all targets' weights, which must be the same on every process."""
        with torch.no_grad(), distributed.together():
            found = fingerprints(modules)
        if not distributed.same_everywhere([f.tolist() for f in found.values()]):
            raise AdapterError(
                "the processes hold different base weights: their statistics cannot be added. Load "
                "the same checkpoint on all of them; under accelerate's FSDP, set "
                "fsdp_cpu_ram_efficient_loading to false, which leaves the weights of all processes "
                "but the first empty."
            )
        return found

    def redistributes(self, method: Method) -> bool:
        """Whether the layers' ranks follow from all layers' statistics."""
        return (
            self.with_ranks is not None and isinstance(method, RanksDirections) and method.rho > 1
        )

    def reallocated(self, method: Method, statistics: Statistics | None) -> Measured:
        """The same, each layer at the rank that its directions deserve, where the method says so."""
        if statistics is None or not self.redistributes(method):
            return self
        assert self.with_ranks is not None
        assert isinstance(method, RanksDirections)
        served = _served(self.targets, unused_targets(statistics, self.targets))
        # The experts of one parameter have one rank: theirs stays.
        served = {name: target for name, target in served.items() if not target.is_expert}
        configured = {name: target.spec.rank for name, target in served.items()}
        share = int(getattr(method, "rank_factor", 1))
        possible = {
            n: min(t.spec.out_features, t.spec.in_features) // share for n, t in served.items()
        }
        limits = rank_limits(configured, possible, method.rho)
        values = value_directions(served, statistics, method, limits, self.budget)
        return replace(self, targets=self.with_ranks(allocate_ranks(values, configured)))

    def capped(self) -> Measured:
        """The same, for batches that are cut to this process's share already."""
        assert self.settings is not None
        return replace(self, settings=replace(self.settings, max_sequences=None))

    def batches(self, data: Iterable[Any]) -> list[dict[str, Any]]:
        """This process's share of the data, kept."""
        assert self.settings is not None
        return sample(data, self.settings.max_sequences)

    def probe(self, batches: Sequence[Mapping[str, Any]]) -> Probe:
        """The loss on these batches."""
        assert self.settings is not None
        return Probe(self.model, self.modules, batches, self.settings.loss_reduction, self.loss_fn)


def find_start(
    method: Method,
    measured: Measured,
    data: Iterable[Any] | None,
    statistics: Statistics | None,
    precision: Literal["fast", "exact"],
) -> Start:
    """Factors by the method, from statistics or from data; measured, where it asks for that."""
    calibrated = bool(getattr(method, "calibrated", False))
    if not (calibrated and data is not None):
        if statistics is None and method.needs:
            assert data is not None
            if not measured.redistributes(method):
                return _streamed(method, measured, data, precision)
            statistics = measured.statistics(data)
        measured = measured.reallocated(method, statistics)
        return _solved(method, measured, statistics, precision, unmeasured=calibrated)
    population = shared_population(data)
    batches = measured.batches(data)
    steps = method.steps if isinstance(method, Natural) else 1
    apart = statistics is None or steps > 1
    measured = measured.capped()

    def parts(step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Sequences of a step's statistics, and those that it is measured on: others every time."""
        if not apart:
            return batches, batches
        before = rows_before(batches)
        share = measured.calibration_share
        return split_batches(batches, share, before, distributed.anywhere, fold=step - 1)

    if statistics is None:
        statistics = measured.statistics(parts(1)[0], population)
    else:
        parts(1)  # too few sequences are an error before long work
    measured = measured.reallocated(method, statistics)
    if isinstance(method, Natural):
        unused = unused_targets(statistics, measured.targets)
        served = _served(measured.targets, unused)
        factors, search = natural_start(
            method,
            served,
            lambda step: measured.probe(parts(step)[1]),
            lambda step, at: measured.statistics(parts(step)[0], population, at),
            first=statistics,
            progress=measured.progress,
        )
        if search.gain < method.least_gain:
            return _plain(measured, unused, search)
        return Start(factors, _sizes(factors, served), unused, search)
    probe = measured.probe(parts(1)[1])
    start = _solved(method, measured, statistics, precision, unmeasured=False)
    factors, search = calibrate_factors(start.factors, measured.targets.layers, probe)
    return Start(factors, _sizes(factors, measured.targets.layers), start.unused, search)


def _streamed(
    method: Method,
    measured: Measured,
    data: Iterable[Any],
    precision: Literal["fast", "exact"],
) -> Start:
    """Solve each pass's layers before the next pass, and forget what is solved."""
    assert measured.settings is not None
    budget = measured.budget
    device = input_device(measured.model)
    factors: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    names: list[str] = []
    for part in measured.passes(data):
        if budget is not None and device.type != "cpu":
            room = budget - solving_bytes(measured.targets.layers, method.needs)
            part.relieve(device, held_bytes(measured.model, device) - room)
        names += part.metadata["unused"]
        served = {name: measured.targets.layers[name] for name in part.names}
        found = solve_layers(
            served,
            part,
            method,
            precision=precision,
            progress=measured.progress,
            release=True,
            max_memory=budget,
        )
        factors |= found[0]
        sizes |= found[1]
        del part
    check_unused(names, factors, measured.settings)
    unused = {n: UNUSED for n in names}
    ordered = [name for name in measured.targets.layers if name in factors]
    return Start({n: factors[n] for n in ordered}, {n: sizes[n] for n in ordered}, unused, None)


def _solved(
    method: Method,
    measured: Measured,
    statistics: Statistics | None,
    precision: Literal["fast", "exact"],
    *,
    unmeasured: bool,
) -> Start:
    unused = {} if statistics is None else unused_targets(statistics, measured.targets)
    served = _served(measured.targets, unused)
    factors, sizes = solve_layers(
        served,
        statistics,
        method,
        precision=precision,
        progress=measured.progress,
        max_memory=measured.budget,
    )
    if unmeasured:
        terms = {n: LowRank(f.B * served[n].spec.scaling, f.A) for n, f in factors.items()}
        length = length_for(relative_sizes(terms, weight_norms(served)), UNMEASURED_SIZE)
        logger.warning(
            "%s: there is no data to measure the length of the start on; it is set so that the median "
            "layer moves by %g of its weight's norm. Pass data=... beside statistics=... to measure it.",
            type(method).__name__,
            UNMEASURED_SIZE,
        )
        factors = scale_factors(factors, length)
        sizes = {name: size * length for name, size in sizes.items()}
    return Start(factors, sizes, unused, None)


def _plain(measured: Measured, unused: dict[str, str], search: SearchResult) -> Start:
    """Plain LoRA: what PEFT draws for a new adapter, drawn anew for one that was there before."""
    factors: dict[str, Factors] = {}
    if measured.with_ranks is None:
        served = _served(measured.targets, unused)
        factors = solve_layers(served, None, Vanilla(), progress=False)[0]
    return Start(factors, {}, unused, search, plain=True)


def _served(targets: Targets, unused: Mapping[str, str]) -> dict[str, Target]:
    return {name: t for name, t in targets.layers.items() if name not in unused}


def _sizes(factors: Mapping[str, Factors], targets: Mapping[str, Target]) -> dict[str, float]:
    return {
        name: float(
            relative_size(pair, read_weight(targets[name].module, name), targets[name].spec.scaling)
        )
        for name, pair in factors.items()
    }
