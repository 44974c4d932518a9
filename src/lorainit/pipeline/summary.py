"""What is said and kept of a start: one line for the log, and what was measured."""

from __future__ import annotations

import logging
import math
import statistics as stats
import sys
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from lorainit.calibration import SearchResult
from lorainit.calibration.learning_rate import LearningRate
from lorainit.data.sampling import Sample
from lorainit.parallel import collectives
from lorainit.pipeline.start import Start
from lorainit.statistics import Statistics
from lorainit.types import Method

logger = logging.getLogger("lorainit")


def measured_losses(start: Start) -> dict[str, float]:
    """Losses on the calibration sequences, before and after the start."""
    search = start.search
    if search is None:
        return {}
    if start.refusal is not None:
        return {
            "base_loss": search.start_loss,
            "start_loss": search.start_loss,
            "length": 0.0,
            "refused_loss": search.loss
            if search.unclear is None
            else search.start_loss - search.unclear.mean,
        } | _by_sequence(search)
    return {
        "base_loss": search.start_loss,
        "start_loss": search.loss,
        "length": search.length,
    } | _by_sequence(search)


def _by_sequence(search: SearchResult) -> dict[str, float]:
    """On how many sequences the losses rest, and the standard error of their difference."""
    found = search.gain_by_sequence or search.unclear
    if found is None:
        return {}
    error = {"gain_error": found.error} if math.isfinite(found.error) else {}
    return {"sequences": float(found.sequences)} | error


def sequences_read(statistics: Statistics | None, sample: Sample | None) -> dict[str, float]:
    """How many sequences a start rests on, over all processes: every one has to call this.

    Args:
        statistics: that were given.
        sample: of the data, where they are read for the start; sequences held back are among them.
    """
    found = {}
    if statistics is not None and "sequences" in statistics.metadata:
        found["statistics_sequences"] = float(statistics.metadata["sequences"])
    if sample is not None:
        found["data_sequences"] = collectives.sum_counts([sample.sequences])[0]
    return found


def report_line(line: str, *, progress: bool) -> None:
    """Log the line; where nobody listens to the log, show it above the progress bars."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif progress:
        tqdm.write(line, file=sys.stderr)


def summary(
    method: Method,
    start: Start,
    left_out: Mapping[str, str],
    filled_up: Mapping[str, str] | None = None,
    skipped: Sequence[str] = (),
    heads: str = "",
    rate: LearningRate | str | None = None,
) -> str:
    """One line: how large the start is, and what was left out and why.

    Args:
        method: of the start.
        start: what was found.
        left_out: layers at PEFT's start, with the reason.
        filled_up: layers smaller than the rank, with both ranks.
        skipped: parameters of experts that the configuration does not target.
        heads: what is said of heads beside the adapter.
        rate: what is suggested, or why nothing is.
    """
    line, sizes = f"{type(method).__name__}: ", start.sizes
    if start.refusal is not None:
        line += f"plain LoRA: {start.refusal}"
    elif sizes:
        line += f"{len(sizes)} layers started"
        # Of a weight that could not be read there is no size.
        if known := [size for size in sizes.values() if not math.isnan(size)]:
            largest, median = max(known), stats.median(known)
            line += f", |s B A| / |W| largest {largest:.2g}, median {median:.2g}"
    else:
        line += "PEFT's own start"
    if start.search is not None and start.refusal is None:
        line += f", calibration loss {start.search.start_loss:.4g} to {start.search.loss:.4g}"
        if (found := start.search.gain_by_sequence) is not None:
            line += f" on {found.sequences} sequences"
    if heads:
        line += f"; {heads}"
    if isinstance(rate, LearningRate):
        line += f". Suggested: {rate}"
    elif rate is not None:
        line += f". {rate[:1].upper()}{rate[1:].rstrip('.')}"
    if left_out:
        line += f". Left at PEFT's start: {_shown(left_out)}"
    if filled_up:
        line += f". Smaller than the rank, filled up as PEFT would: {_shown(filled_up)}"
    if skipped:
        line += (
            f". {len(skipped)} stacked parameters of experts are no targets (first '{skipped[0]}'): "
            "target_parameters of the LoraConfig would name them"
        )
    return line


def _shown(reasons: Mapping[str, str]) -> str:
    """The first layers with their reasons, every reason among them."""
    first = dict.fromkeys(reasons.values())
    names = [next(n for n, why in reasons.items() if why == reason) for reason in first]
    names += [name for name in reasons if name not in names]
    shown = "; ".join(f"{name}: {reasons[name]}" for name in names[:4])
    return shown + (f"; and {len(reasons) - 4} more" if len(reasons) > 4 else "")
