"""The length of a start along its own factors."""

from __future__ import annotations

from collections.abc import Mapping

from lorainit.adapters.targets import Target
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.line_search import SearchResult, clear_result, search_length
from lorainit.calibration.paired import SequenceLosses
from lorainit.calibration.sizes import FIRST_SIZE, length_for, relative_sizes, weight_norms
from lorainit.models.displacement import LowRank
from lorainit.types import Factors


def terms_of(factors: Mapping[str, Factors], targets: Mapping[str, Target]) -> dict[str, LowRank]:
    """What displaced factors add to the weights, ``s B A`` of each layer."""
    return {n: LowRank(f.B * targets[n].spec.scaling, f.A) for n, f in factors.items()}


def scale_factors(factors: Mapping[str, Factors], length: float) -> dict[str, Factors]:
    """Factors with ``B`` times `length`."""
    return {n: Factors(f.A, f.B * length, f.anchored) for n, f in factors.items()}


def calibrate_factors(
    factors: Mapping[str, Factors],
    targets: Mapping[str, Target],
    loss: HeldOutLoss,
    trust_region: float,
) -> tuple[dict[str, Factors], SearchResult]:
    """Any method's displaced start at the length, along its own direction, with the least loss.

    A layer that would move by more than `trust_region` of its weight's norm stays at that size. A length
    whose gain is not clear over the sequences is not taken, see `clear_result`.
    """
    terms = terms_of(factors, targets)
    sizes = relative_sizes(terms, weight_norms(targets))
    first = length_for(sizes, FIRST_SIZE)

    def lengths(length: float) -> dict[str, float]:
        return {
            name: min(length, trust_region / size) if size > 0 else length
            for name, size in sizes.items()
        }

    measured: list[SequenceLosses] = []

    def at_length(length: float) -> float:
        value = loss_at({n: terms[n].scaled(x) for n, x in lengths(length).items()})
        measured.append(loss_at.latest)
        return value

    with loss.measuring() as loss_at:
        result = search_length(at_length, first, precision=0.3, max_trials=16)
    result, _ = clear_result(result, measured[0], measured[1:])
    found = lengths(result.length)
    scaled = {n: Factors(f.A, f.B * found[n], f.anchored) for n, f in factors.items()}
    return scaled, result
