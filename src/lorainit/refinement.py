"""Starts whose length is measured: a search along a line, and natural steps taken again.

The one loop of the package that goes back: collect, solve, measure, and collect again at the
displaced point. Nothing is installed while it runs; the displacement lives in hooks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics as stats
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.calibration import SearchResult, search_length
from lorainit.methods.metric import KroneckerMetric, cut
from lorainit.methods.natural import Natural
from lorainit.statistics import LossFunction, Statistics, distributed
from lorainit.statistics.batches import to_device
from lorainit.statistics.collect import input_device
from lorainit.statistics.displace import LowRank, displaced
from lorainit.statistics.guard import measuring, unchanged_rng
from lorainit.statistics.losses import batch_loss
from lorainit.statistics.rounds import even_rounds, is_sharded
from lorainit.types import Factors, LayerStatistics, LossReduction

logger = logging.getLogger("lorainit")

_FIRST_SIZE = 3e-3
"""Where the first search begins: this ``|Delta| / |W|``, median over the layers."""

UNMEASURED_SIZE = 1e-3
"""The ``|s B A| / |W|``, median over the layers, of a length that cannot be measured without data."""


@dataclass(frozen=True, eq=False)
class Probe:
    """The mean loss of a few held-back batches at a displaced model, by forward passes alone.

    Attributes:
        model: the base model, or a PeftModel whose adapters are switched off.
        modules: base layers by target name.
        batches: of the calibration sequences.
        loss_reduction: unit of the loss, as in the statistics.
        loss_fn: the user's loss, or None.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    batches: Sequence[Mapping[str, Any]]
    loss_reduction: LossReduction
    loss_fn: LossFunction | None = None

    def loss(self, terms: Mapping[str, LowRank]) -> float:
        """Mean loss with these terms added to the layers, over all processes."""
        device = input_device(self.model)
        total = count = 0.0
        with (
            unchanged_rng(device),
            measuring(self.model),
            torch.no_grad(),
            displaced(self.modules, terms),
        ):
            for batch, counted in even_rounds(self.batches, sharded=is_sharded(self.model)):
                result = batch_loss(
                    self.model, to_device(batch, device), self.loss_reduction, self.loss_fn
                )
                unit = (
                    result.sequences if self.loss_reduction == "sequence" else result.label_tokens
                )
                if not counted:
                    continue
                total += float(result.per_sequence.sum())
                count += float(unit)
        total, count = distributed.sum_counts([total, count])
        return total / count if count else math.nan


def scale_factors(factors: Mapping[str, Factors], length: float) -> dict[str, Factors]:
    """Factors with ``B`` times `length`."""
    return {n: Factors(f.A, f.B * length, f.anchored) for n, f in factors.items()}


def calibrate_factors(
    factors: Mapping[str, Factors], targets: Mapping[str, Target], probe: Probe
) -> tuple[dict[str, Factors], SearchResult]:
    """Any method's displaced start at the length, along its own direction, with the least loss."""
    terms = {
        name: LowRank(pair.B * targets[name].spec.scaling, pair.A) for name, pair in factors.items()
    }
    first = first_length(terms, targets, _FIRST_SIZE)
    result = search_length(
        lambda length: probe.loss({n: t.scaled(length) for n, t in terms.items()}),
        first,
        precision=0.3,
        max_trials=16,
    )
    return scale_factors(factors, result.length), result


def first_length(terms: Mapping[str, LowRank], targets: Mapping[str, Target], size: float) -> float:
    """The length at which the median layer moves by `size` of its weight's norm."""
    sizes = []
    for name, term in terms.items():
        square = ((term.left.mT @ term.left) * (term.right @ term.right.mT)).sum().clamp_min(0)
        weight = read_weight(targets[name].module, name)
        sizes.append(float(square.sqrt()) / max(float(weight.float().norm()), 1e-30))
    median = stats.median(sizes) if sizes else 0.0
    # A search that began elsewhere on another process might end after another number of trials.
    return distributed.of_first(size / median if median > 0 else 1.0)


# --- repeated natural steps -------------------------------------------------------------------


@dataclass(eq=False)
class _Stack:
    """Layers of one shape and rank, their present displacement and their newest step, stacked."""

    targets: list[Target]
    left: Tensor | None = None
    right: Tensor | None = None
    metric: KroneckerMetric | None = None
    step_left: Tensor | None = None
    step_right: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.targets[0].spec.rank

    def set_step(self, method: Natural, statistics: Mapping[str, LayerStatistics]) -> None:
        """Metric and step from statistics taken at the present displacement."""
        device = next(self.targets[0].module.parameters()).device
        if device.type == "meta":
            # The weight is offloaded; the statistics are where they were collected.
            device = statistics[self.targets[0].name].gradient.device
        layers = [statistics[t.name].only(method.needs).to(device=device) for t in self.targets]
        self.metric, (left, right) = method.step(LayerStatistics.stack(layers), self.rank)
        self.step_left, self.step_right = left, right

    def moved(self, length: float, directions: int) -> tuple[Tensor, Tensor]:
        """The displacement after a step of this length along its first directions, cut to rank."""
        assert self.metric is not None
        assert self.step_left is not None
        assert self.step_right is not None
        used = torch.arange(self.step_left.shape[-1], device=self.step_left.device) < directions
        step = self.step_left * (used * length)
        if self.left is None or self.right is None:
            return step, self.step_right
        whole = self.metric.into(
            torch.cat([self.left, step], dim=-1), torch.cat([self.right, self.step_right], dim=-2)
        )
        return self.metric.out_of(*cut(*whole, self.rank))


@dataclass(eq=False)
class NaturalSteps:
    """Natural steps over all layers, one after the other.

    Attributes:
        method: its settings.
        targets: by name.
        probe: the loss on calibration sequences.
    """

    method: Natural
    targets: Mapping[str, Target]
    probe: Probe
    searches: list[SearchResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups: dict[tuple[Any, ...], list[Target]] = {}
        for target in self.targets.values():
            spec = target.spec
            device = next((p.device for p in target.module.parameters()), None)
            key = (spec.out_features, spec.in_features, spec.rank, device)
            groups.setdefault(key, []).append(target)
        self.stacks = [_Stack(members) for members in groups.values()]

    def terms(self, placed: Callable[[_Stack], tuple[Tensor, Tensor] | None]) -> dict[str, LowRank]:
        """One displacement by layer, from what `placed` gives for each stack."""
        out = {}
        for stack in self.stacks:
            pair = placed(stack)
            if pair is None:
                continue
            left, right = pair[0].float(), pair[1].float()
            for i, target in enumerate(stack.targets):
                out[target.name] = LowRank(left[i], right[i])
        return out

    def present(self) -> dict[str, LowRank]:
        """The displacement so far."""
        return self.terms(
            lambda s: None if s.left is None or s.right is None else (s.left, s.right)
        )

    def take(self, statistics: Statistics) -> SearchResult:
        """One step from statistics taken at the present displacement; its length is measured."""
        for stack in self.stacks:
            stack.set_step(self.method, statistics)
        result, directions = self._search()
        if result.length > 0:
            for stack in self.stacks:
                stack.left, stack.right = stack.moved(result.length, directions)
        elif not self.searches:
            # Not one length helps: keep the directions, and start where the model is.
            for stack in self.stacks:
                stack.left, stack.right = stack.moved(0.0, 0)
        self.searches.append(result)
        for stack in self.stacks:
            if stack.left is not None and stack.right is not None:
                stack.left, stack.right = stack.left.contiguous(), stack.right.contiguous()
                distributed.broadcast([stack.left, stack.right], 0)
            stack.metric = stack.step_left = stack.step_right = None
        return result

    def factors(self) -> dict[str, Factors]:
        """The displacement as the adapter's factors."""
        out = {}
        for stack in self.stacks:
            assert stack.left is not None
            assert stack.right is not None
            scaling = torch.tensor([t.spec.scaling for t in stack.targets])
            for i, target in enumerate(stack.targets):
                a, b = self.method.factors(stack.left[i], stack.right[i], float(scaling[i]))
                out[target.name] = Factors(a.float(), b.float(), anchored=False)
        return {name: out[name] for name in self.targets}

    def _search(self) -> tuple[SearchResult, int]:
        """Length, and how many directions to use: first a few, then others at lengths near by."""
        largest = max(stack.rank for stack in self.stacks)
        candidates = sorted({min(2**i, largest) for i in range(largest.bit_length() + 1)})
        base = self.probe.loss(self.present())

        def loss_at(length: float, directions: int) -> float:
            if length == 0:
                return base
            return self.probe.loss(self.terms(lambda s: s.moved(length, directions)))

        few = candidates[min(1, len(candidates) - 1)]
        first = self._first_length(few)
        best = search_length(
            lambda t: loss_at(t, few), first, precision=1.0, max_trials=14, start_loss=base
        )
        chosen = few
        trials = list(best.trials)
        for directions in (c for c in candidates if c != few and best.length > 0):
            # More directions make a longer step of the same length.
            for length in (best.length, best.length * (few / directions) ** 0.5):
                loss = loss_at(length, directions)
                trials.append((length, loss))
                if math.isfinite(loss) and loss < best.loss:
                    best = SearchResult(length, loss, base, ())
                    chosen = directions
        if best.length > 0:
            for length in (best.length * 1.4, best.length / 1.4):
                loss = loss_at(length, chosen)
                trials.append((length, loss))
                if math.isfinite(loss) and loss < best.loss:
                    best = SearchResult(length, loss, base, ())
        return SearchResult(best.length, best.loss, base, tuple(trials)), chosen

    def _first_length(self, directions: int) -> float:
        if self.searches and self.searches[-1].length > 0:
            return self.searches[-1].length / 4
        unit = self.terms(
            lambda s: (s.step_left[..., :directions], s.step_right[..., :directions, :])  # type: ignore[index]
        )
        return first_length(unit, self.targets, _FIRST_SIZE)


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Any]:
    with tqdm(total=total, desc="Natural", unit="step", disable=None if progress else True) as bar:
        yield bar


def natural_start(
    method: Natural,
    targets: Mapping[str, Target],
    probe: Probe,
    collect_at: Callable[[Mapping[str, LowRank]], Statistics],
    *,
    first: Statistics | None = None,
    progress: bool = True,
    on_step: Callable[[int, dict[str, LowRank], SearchResult], None] | None = None,
) -> tuple[dict[str, Factors], list[SearchResult]]:
    """`method.steps` natural steps, each measured; the start they lead to.

    Args:
        method: its settings.
        targets: layers by name.
        probe: the loss on calibration sequences.
        collect_at: statistics at a displacement.
        first: statistics at the base model, where they are there already.
        progress: show a progress bar.
        on_step: called after each step, with its number, the displacement and the search.

    Returns:
        Factors by layer, and every step's search.
    """
    steps = NaturalSteps(method, targets, probe)
    with _bar(method.steps, progress) as bar:
        for number in range(1, method.steps + 1):
            at_base = number == 1 and first is not None
            statistics = first if at_base else collect_at(steps.present())
            assert statistics is not None
            result = steps.take(statistics)
            bar.set_postfix(loss=f"{result.loss:.4g}")
            bar.update()
            if on_step is not None:
                on_step(number, steps.present(), result)
            if result.length == 0:
                logger.info("step %d of %d found no way down; stopping", number, method.steps)
                break
    return steps.factors(), steps.searches
