"""The length of a start, measured on held-back batches by forward passes at a displaced model."""

from __future__ import annotations

import contextlib
import math
import statistics as stats
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorainit.adapters.targets import Target
from lorainit.adapters.weights import read_weight
from lorainit.calibration import SearchResult, search_length
from lorainit.methods._settings import TRUST_REGION
from lorainit.statistics import LossFunction, distributed
from lorainit.statistics.anatomy import input_device
from lorainit.statistics.batches import to_device
from lorainit.statistics.displace import LowRank, displaced
from lorainit.statistics.guard import measuring, unchanged_rng
from lorainit.statistics.losses import batch_loss
from lorainit.statistics.rounds import even_rounds, is_sharded
from lorainit.types import Factors, LossReduction

FIRST_SIZE = 3e-3
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

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[Mapping[str, LowRank]], float]]:
        """Inside, a function: the mean loss, over all processes, with these terms on the layers."""
        device = input_device(self.model)
        rounds = even_rounds(self.batches, sharded=is_sharded(self.model))
        moved = [(to_device(batch, device), counted) for batch, counted in rounds]
        present: dict[str, LowRank] = {}

        def loss(terms: Mapping[str, LowRank]) -> float:
            present.clear()
            present.update(terms)
            # Every trial draws the same numbers, if the model or the loss draws any.
            with unchanged_rng(device), torch.no_grad():
                # One read of the device at the end. Who runs more rounds than it has batches, because
                # the others do, does not count them.
                sums = [self._sums(batch) * counted for batch, counted in moved]
            total, count = torch.stack(sums).cpu().double().sum(0).tolist() if sums else (0.0, 0.0)
            total, count = distributed.sum_counts([total, count])
            return total / count if count else math.nan

        with measuring(self.model), displaced(self.modules, present):
            yield loss

    def _sums(self, batch: Mapping[str, Any]) -> Tensor:
        """``(2,)``: the batch's summed loss, and what it is divided by."""
        result = batch_loss(self.model, batch, self.loss_reduction, self.loss_fn)
        unit = result.sequences if self.loss_reduction == "sequence" else result.label_tokens
        total = result.per_sequence.sum()
        return torch.stack([total, unit.to(total)])


def scale_factors(factors: Mapping[str, Factors], length: float) -> dict[str, Factors]:
    """Factors with ``B`` times `length`."""
    return {n: Factors(f.A, f.B * length, f.anchored) for n, f in factors.items()}


def calibrate_factors(
    factors: Mapping[str, Factors], targets: Mapping[str, Target], probe: Probe
) -> tuple[dict[str, Factors], SearchResult]:
    """Any method's displaced start at the length, along its own direction, with the least loss.

    A layer that would leave its `TRUST_REGION` stays at the edge.
    """
    terms = {
        name: LowRank(pair.B * targets[name].spec.scaling, pair.A) for name, pair in factors.items()
    }
    sizes = relative_sizes(terms, weight_norms(targets))
    first = length_for(sizes, FIRST_SIZE)

    def lengths(length: float) -> dict[str, float]:
        return {
            name: min(length, TRUST_REGION / size) if size > 0 else length
            for name, size in sizes.items()
        }

    with probe.opened() as loss:
        result = search_length(
            lambda length: loss({n: terms[n].scaled(x) for n, x in lengths(length).items()}),
            first,
            precision=0.3,
            max_trials=16,
        )
    found = lengths(result.length)
    scaled = {n: Factors(f.A, f.B * found[n], f.anchored) for n, f in factors.items()}
    return scaled, result


def relative_sizes(terms: Mapping[str, LowRank], norms: Mapping[str, float]) -> dict[str, float]:
    """``|Delta|_F / |W|_F`` of every layer."""
    sizes = {}
    for name, term in terms.items():
        square = ((term.left.mT @ term.left) * (term.right @ term.right.mT)).sum().clamp_min(0)
        sizes[name] = float(square.sqrt()) / norms[name]
    return sizes


def length_for(sizes: Mapping[str, float], size: float) -> float:
    """The length at which the median layer moves by `size` of its weight's norm."""
    median = stats.median(sizes.values()) if sizes else 0.0
    # A search that began elsewhere on another process might end after another number of trials.
    return distributed.of_first(size / median if median > 0 else 1.0)


def weight_norms(targets: Mapping[str, Target]) -> dict[str, float]:
    """``|W|_F`` of every layer, above zero; sharded weights are read on every process."""
    norms = {n: float(read_weight(t.module, n).float().norm()) for n, t in targets.items()}
    return {name: max(norm, 1e-30) for name, norm in norms.items()}
