"""From a sample or statistics to the start: solve, and measure its length where the method asks for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeGuard

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.calibration.along_factors import calibrate_factors, scale_factors, terms_of
from lorainit.calibration.line_search import SearchResult
from lorainit.calibration.sizes import (
    UNMEASURED_SIZE,
    length_for,
    relative_sizes,
    weight_norms,
)
from lorainit.calibration.take_steps import take_steps
from lorainit.data.sampling import Sample
from lorainit.methods.vanilla import Vanilla
from lorainit.pipeline.checks import unused_targets
from lorainit.pipeline.giving_back import given_back, worth_giving_back
from lorainit.pipeline.measurements import Measurements
from lorainit.solve.layers import relative_size, solve_layers
from lorainit.solve.stacks import more_than_there_is, solving_bytes
from lorainit.statistics.collect.finalize import check_unused
from lorainit.statistics.collection import PlannedCollection
from lorainit.statistics.memory.peak import held_bytes
from lorainit.statistics.store.statistics import Statistics
from lorainit.types import (
    ChangesStart,
    Factors,
    ForgetsStatistics,
    GivesBack,
    LeavesItToHeads,
    MeasuresLength,
    Method,
    RefusesStart,
    TakesSteps,
)

logger = logging.getLogger("lorainit")

Precision = Literal["fast", "exact"]


@dataclass(frozen=True, eq=False)
class Start:
    """What was found for one adapter.

    Attributes:
        factors: by target name.
        sizes: ``|s B A| / |W|`` by target name.
        unused: targets that no sequence reached, with the reason.
        search: the last measurement of a length, if any.
        refusal: why it is plain LoRA after all; there are no factors then, unless the adapter was there
            before.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    search: SearchResult | None = None
    refusal: str | None = None

    def without_anchored_words(self, targets: Mapping[str, Target]) -> Start:
        """The same, embeddings left out whose factors want an anchor: PEFT's own cannot be given one."""
        names = [n for n, f in self.factors.items() if targets[n].spec.one_hot and f.anchored]
        if not names:
            return self
        reason = "an embedding's factors can get no anchor, which the method's start needs"
        return replace(
            self,
            factors={n: f for n, f in self.factors.items() if n not in names},
            sizes={n: size for n, size in self.sizes.items() if n not in names},
            unused=self.unused | dict.fromkeys(names, reason),
        )


def needs_sample(method: Method, statistics: Statistics | None, *, has_data: bool) -> bool:
    """Whether data are looked at: statistics are to be collected, or a length measured."""
    return has_data and (_is_measured(method) or (statistics is None and bool(method.needs)))


def _is_measured(method: Method) -> bool:
    return isinstance(method, MeasuresLength) and bool(method.calibrated)


def find_start(
    method: Method,
    measurements: Measurements,
    sample: Sample | None,
    statistics: Statistics | None,
    precision: Precision,
    calibration_share: float,
    *,
    heads_fitted: bool = False,
) -> Start:
    """Factors by the method, from statistics or from a sample; measured, where it asks for that.

    Args:
        method: how to find the start.
        measurements: of the model.
        sample: of the data, see `needs_sample`; None where there is none.
        statistics: collected before, or None.
        precision: of the solves.
        calibration_share: of the sample, held back to measure lengths on where statistics are collected.
        heads_fitted: whether heads beside the adapter were fitted first, and are in use.
    """
    if heads_fitted and _leaves_it_to_heads(method, measurements):
        return _refused(measurements, {}, None, method.beside_fitted_heads)
    if isinstance(method, ChangesStart):
        like = find_start(
            method.like,
            measurements,
            sample,
            statistics,
            precision,
            calibration_share,
            heads_fitted=heads_fitted,
        )
        return like if like.refusal is not None else _changed(method, measurements, like)
    if sample is not None and isinstance(method, MeasuresLength) and method.calibrated:
        return _measured(method, measurements, sample, statistics, precision, calibration_share)
    if sample is not None and not measurements.redistributes(method):
        planned = measurements.planned(sample, _workspace(method, measurements, precision))
        return _part_by_part(method, measurements, planned, precision)
    if sample is not None:
        statistics = measurements.statistics(sample)
    measurements = measurements.reallocated(method, statistics)
    start = _solved(method, measurements, statistics, precision)
    return _at_stated_length(start, measurements, method) if _is_measured(method) else start


def _leaves_it_to_heads(method: Method, measurements: Measurements) -> TypeGuard[LeavesItToHeads]:
    """Whether nothing is to be done beside fitted heads; what quantization took is given back all the same."""
    if not isinstance(method, LeavesItToHeads):
        return False
    return worth_giving_back(method, measurements.reference) is None


def _measured(
    method: MeasuresLength,
    measurements: Measurements,
    sample: Sample,
    statistics: Statistics | None,
    precision: Precision,
    calibration_share: float,
) -> Start:
    """A start whose length is found on sequences that its statistics do not hold."""
    steps = method.steps if isinstance(method, TakesSteps) else 1
    reference = worth_giving_back(method, measurements.reference)
    apart = statistics is None or steps > 1

    def parts(step: int) -> tuple[Sample, Sample]:
        """Sequences of a step's statistics, and those that it is measured on: others every time."""
        return sample.held_back(calibration_share, step - 1) if apart else (sample, sample)

    # Too few sequences are an error before long work.
    first = parts(1)
    planned, workspace = None, 0
    if statistics is None and method.needs:
        workspace = _workspace(method, measurements, precision)
        planned = measurements.planned(first[0], workspace)
        forgets = isinstance(method, ForgetsStatistics) or not isinstance(method, TakesSteps)
        whole = reference is not None or measurements.redistributes(method) or not forgets
        if whole or not planned.is_divided:
            statistics, planned = measurements.statistics(first[0], planned=planned), None
    measurements = measurements.reallocated(method, statistics)
    unused = {} if statistics is None else unused_targets(statistics, measurements.targets)
    served = measurements.served(unused)
    if isinstance(method, GivesBack) and reference is not None:
        assert statistics is not None
        back = measurements.held_out_loss(first[1])
        found = given_back(method, measurements, served, statistics, back, precision)
        if found is not None:
            return Start(found[0], _sizes(found[0], served), unused, found[1])
    if isinstance(method, TakesSteps):
        factors, search = take_steps(
            method,
            served,
            lambda step: measurements.held_out_loss(parts(step)[1]),
            lambda step, at: measurements.statistics(parts(step)[0], at),
            first=statistics,
            parts=None if planned is None else _solvable(planned, measurements, unused, workspace),
            max_memory=measurements.settings.budget,
            progress=measurements.settings.progress,
        )
        if planned is not None:
            check_unused(list(unused), factors, measurements.subject)
            served = measurements.served(unused)
    else:
        if planned is None:
            start = _solved(method, measurements, statistics, precision)
        else:
            start = _part_by_part(method, measurements, planned, precision)
            unused, served = start.unused, measurements.served(start.unused)
        held_out = measurements.held_out_loss(first[1])
        factors, search = calibrate_factors(start.factors, served, held_out, method.trust_region)
    refusal = _refusal(method, search)
    if refusal is not None:
        return _refused(measurements, unused, search, refusal)
    return Start(factors, _sizes(factors, served), unused, search)


def _workspace(method: Method, measurements: Measurements, precision: Precision) -> int:
    return solving_bytes(measurements.targets.layers, method, exact=precision == "exact")


def _solvable(
    planned: PlannedCollection, measurements: Measurements, unused: dict[str, str], workspace: int
) -> Iterator[Statistics]:
    """Parts of a collection, some on the host where a solve would not fit beside them; fills `unused`."""
    budget, device = measurements.settings.budget, measurements.device
    within = budget if device.type != "cpu" else None
    if within is not None:
        said = more_than_there_is(held_bytes(measurements.model, device), workspace, within)
        if said is not None:
            logger.warning(said)
    for part in planned.parts():
        if within is not None:
            part.relieve(device, held_bytes(measurements.model, device) + workspace - within)
        unused |= unused_targets(part, measurements.targets)
        yield part
        # Nobody holds it while the next one is made.
        del part


def _part_by_part(
    method: Method, measurements: Measurements, planned: PlannedCollection, precision: Precision
) -> Start:
    """Solve each part's layers before the next part, and forget what is solved."""
    factors: dict[str, Factors] = {}
    sizes: dict[str, float] = {}
    unused: dict[str, str] = {}
    workspace = _workspace(method, measurements, precision)
    for part in _solvable(planned, measurements, unused, workspace):
        served = {name: measurements.targets.layers[name] for name in part.names}
        found = solve_layers(
            served,
            part,
            method,
            precision=precision,
            progress=measurements.settings.progress,
            release=True,
            max_memory=measurements.settings.budget,
            reference=measurements.reference,
        )
        factors |= found[0]
        sizes |= found[1]
        del part
    check_unused(list(unused), factors, measurements.subject)
    ordered = [name for name in measurements.targets.layers if name in factors]
    return Start({n: factors[n] for n in ordered}, {n: sizes[n] for n in ordered}, unused)


def _solved(
    method: Method,
    measurements: Measurements,
    statistics: Statistics | None,
    precision: Precision,
) -> Start:
    unused = {} if statistics is None else unused_targets(statistics, measurements.targets)
    factors, sizes = solve_layers(
        measurements.served(unused),
        statistics,
        method,
        precision=precision,
        progress=measurements.settings.progress,
        max_memory=measurements.settings.budget,
        reference=measurements.reference,
    )
    return Start(factors, sizes, unused)


def _at_stated_length(start: Start, measurements: Measurements, method: Method) -> Start:
    """The start at a length that is stated, since there is no data to measure it on."""
    served = measurements.served(start.unused)
    terms = terms_of(start.factors, served)
    length = length_for(relative_sizes(terms, weight_norms(served)), UNMEASURED_SIZE)
    logger.warning(
        "%s: there is no data to measure the length of the start on; it is set so that the median "
        "layer moves by %g of its weight's norm. Pass data=... beside statistics=... to measure it.",
        type(method).__name__,
        UNMEASURED_SIZE,
    )
    sizes = {name: size * length for name, size in start.sizes.items()}
    return Start(scale_factors(start.factors, length), sizes, start.unused)


def _refusal(method: MeasuresLength, search: SearchResult) -> str | None:
    """Why plain LoRA is taken in place of the start that was measured; None: it is not."""
    if search.unmoved:
        return (
            f"the loss on held-back sequences is {search.start_loss:.4g} whatever the start, as that of a "
            "loss that compares with a reference model inside the same forward, which the start moves "
            "along: compute the reference before (DPO: precompute_ref_log_probs=True), or hold a second "
            "model for it"
        )
    if search.unclear is not None:
        found = search.unclear
        few = f"with a standard error of {found.error:.2g}: not clearly"
        return (
            f"the measured start would lower the loss by {found.mean:.3g} on {found.sequences} held-back "
            f"sequences, {few if math.isfinite(found.error) else 'too few to tell'}. Give more "
            "data, or a larger calibration_share"
        )
    if not isinstance(method, RefusesStart):
        return None
    share, gain = search.is_share, search.gain
    reason = method.refusal(gain, share=share)
    if reason is None:
        return None
    moved = f"take {gain:.1%} of the loss away" if share else f"lower the loss by {gain:.3g}"
    return f"the measured start would {moved}, {reason}"


def _refused(
    measurements: Measurements, unused: dict[str, str], search: SearchResult | None, refusal: str
) -> Start:
    """Plain LoRA: what PEFT draws for a new adapter, drawn anew for one that was there before."""
    factors: dict[str, Factors] = {}
    if measurements.with_ranks is None:
        served = measurements.served(unused)
        factors = solve_layers(served, None, Vanilla(), progress=False)[0]
    return Start(factors, {}, unused, search, refusal)


def _changed(method: ChangesStart, measurements: Measurements, like: Start) -> Start:
    """Another method's start, changed layer by layer; what was measured was that one's loss."""
    factors = {}
    for name, pair in like.factors.items():
        weight = read_weight(measurements.targets.layers[name].module, name)
        factors[name] = method.changed(pair, weight)
    return replace(like, factors=factors, search=None)


def _sizes(factors: Mapping[str, Factors], targets: Mapping[str, Target]) -> dict[str, float]:
    return {
        name: float(
            relative_size(pair, read_weight(targets[name].module, name), targets[name].spec.scaling)
        )
        for name, pair in factors.items()
    }
