"""What quantization took, given back by a method that has another start where there is nothing to give back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from lorainit.adapters.reference import ReferenceWeights
from lorainit.adapters.targets import Target
from lorainit.calibration.along_factors import terms_of
from lorainit.calibration.held_out_loss import HeldOutLoss
from lorainit.calibration.line_search import SearchResult
from lorainit.pipeline.measurements import Measurements
from lorainit.solve.layers import solve_layers
from lorainit.statistics import Statistics
from lorainit.types import Factors, GivesBack, Method

logger = logging.getLogger("lorainit")


def worth_giving_back(
    method: Method, reference: ReferenceWeights | None
) -> ReferenceWeights | None:
    """The reference weights, where the method gives back what quantization took, and it took enough."""
    if not isinstance(method, GivesBack) or reference is None:
        return None
    if reference.taken >= method.least_taken:
        return reference
    logger.info(
        "quantization took %.2g of a weight's norm, less than least_taken=%g: the whole rank is the task's "
        "step (QERA and KroneckerQER give back at any width)",
        reference.taken,
        method.least_taken,
    )
    return None


def given_back(
    method: GivesBack,
    measurements: Measurements,
    served: Mapping[str, Target],
    statistics: Statistics,
    held_out: HeldOutLoss,
    precision: Literal["fast", "exact"],
) -> tuple[dict[str, Factors], SearchResult] | None:
    """The method's closed form, and the loss before and after it; None where it does not lower it.

    Args:
        method: what says how.
        measurements: of the quantized model, with the reference weights.
        served: its layers that are started.
        statistics: of these.
        held_out: measures on sequences that they do not hold.
        precision: of the solves.
    """
    factors, _ = solve_layers(
        served,
        statistics,
        method.giving_back,
        precision=precision,
        progress=measurements.settings.progress,
        max_memory=measurements.settings.budget,
        reference=measurements.reference,
    )
    with held_out.measuring() as loss:
        base, value = loss({}), loss(terms_of(factors, served))
    if not value < base:
        logger.info("giving back what quantization took does not lower the loss: left out")
        return None
    return factors, SearchResult(1.0, value, base, ((1.0, value),))
