"""New heads, fitted before the statistics are taken: where that can be done, and what is said of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lorainit.adapters.heads import Head
from lorainit.calibration.fit_heads import PART, HeadFit, fit_heads
from lorainit.data.sampling import Sample
from lorainit.errors import DataError
from lorainit.models.heads import Values, heads_replaced
from lorainit.parallel import collectives
from lorainit.pipeline.measurements import Measurements
from lorainit.types import GRADIENT_STATISTICS

logger = logging.getLogger("lorainit")

TIMES_AS_MANY = 4
"""Heads are fitted on so many times the sequences that statistics are taken of: these run forward only."""


@dataclass(frozen=True, eq=False)
class StartedHeads:
    """Heads beside an adapter, and what was found for them.

    Attributes:
        heads: that could be fitted, by name.
        fit: what was measured; None where nothing was fitted.
        values: weights and biases for the adapter's copies, in their dtype.
    """

    heads: Mapping[str, Head] = field(default_factory=dict)
    fit: HeadFit | None = None
    values: Values = field(default_factory=dict)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the base model computes with the adapter's heads."""
        other = {n: (h.weight, h.bias) for n, h in self.heads.items() if h.differs}
        modules = {name: head.module for name, head in self.heads.items()}
        with heads_replaced(modules, {**other, **self.values}):
            yield

    def record(self) -> dict[str, Any]:
        """What the adapter's side file keeps."""
        if self.fit is None:
            return {}
        return {
            "fitted": list(self.values),
            "loss_before": self.fit.before,
            "loss_after": self.fit.after,
            "standard_error": self.fit.gain.error,
            "sequences": self.fit.gain.sequences,
            "weight_decay": self.fit.decay,
        }

    def line(self) -> str:
        """For the summary; empty where nothing was tried."""
        fit = self.fit
        if fit is None:
            return ""
        names, many = ", ".join(f"'{name}'" for name in fit.tried), len(fit.tried) > 1
        on = f"on {fit.gain.sequences} held-back sequences"
        if self.values:
            return f"head{'s' * many} {names} fitted first, loss {fit.before:.4g} to {fit.after:.4g} {on}"
        return (
            f"head{'s' * many} {names} left as {'they are' if many else 'it is'}: fitted, the loss {on} "
            f"would fall by {fit.gain.mean:.2g}, with a standard error of {fit.gain.error:.2g}"
        )


def start_heads(
    heads: Mapping[str, Head], measurements: Measurements, sample: Sample, share: float
) -> StartedHeads:
    """Fit heads on a part of the sample, and keep them where that lowers the loss of the rest clearly.

    Nothing is fitted, and nothing changed, where there are no labels, or too few sequences, or the loss
    is not one of the heads alone; the log says which.

    Args:
        heads: by name.
        measurements: of the model.
        sample: of the data.
        share: of the sample that is held back.
    """
    labelled = [isinstance(batch.keywords.get("labels"), Tensor) for batch in sample.batches]
    known = measurements.settings.loss_fn is not None or all(labelled)
    if collectives.any_process(not known):
        logger.info("there are no labels to fit the heads on")
        return StartedHeads(heads)
    if not measurements.needs & GRADIENT_STATISTICS:
        # Whose loss it is was not asked yet.
        measurements = replace(measurements, needs=measurements.needs | {"gradient"})
        measurements, sample = measurements.with_own_loss(sample)
    try:
        fitted_on, held_back = sample.held_back(share)
    except DataError as error:
        logger.info("the heads are not fitted: %s", error)
        return StartedHeads(heads)
    present = {name: (head.weight, head.bias) for name, head in heads.items()}
    fit = fit_heads(
        measurements.subject,
        {name: head.module for name, head in heads.items()},
        present,
        fitted_on.batches,
        held_back.batches,
        part=1.0 if collectives.any_process(_numbers(sample)) else PART,
    )
    if fit is None:
        return StartedHeads(heads)
    values = {
        name: (weight.to(heads[name].weight), None if bias is None else bias.to(heads[name].weight))
        for name, (weight, bias) in fit.values.items()
    }
    return StartedHeads(heads, fit, values)


def _numbers(sample: Sample) -> bool:
    """Whether labels are numbers to be hit, and not classes, their probabilities, or zeros and ones."""
    for batch in sample.batches:
        labels = batch.keywords.get("labels")
        if isinstance(labels, Tensor) and labels.is_floating_point():
            known = labels[labels.isfinite()].float()
            between = bool(((known != 0) & (known != 1) & (known != -100)).any())
            if between and not _probabilities(labels.float()):
                return True
    return False


def _probabilities(labels: Tensor) -> bool:
    """Whether every row says how likely each class is, to the precision of half-precision labels."""
    sums = labels.sum(-1)
    several = labels.dim() > 1 and labels.shape[-1] > 1
    return several and bool((labels >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())
