"""What is said and kept of a start: one line for the log, and what was measured."""

from __future__ import annotations

import logging
import statistics as stats
import sys
from collections.abc import Mapping

from tqdm.auto import tqdm

from lorainit.pipeline.start import Start
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
            "refused_loss": search.loss,
        }
    return {
        "base_loss": search.start_loss,
        "start_loss": search.loss,
        "length": search.length,
    }


def report_line(line: str, *, progress: bool) -> None:
    """Log the line; where nobody listens to the log, show it above the progress bars."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    elif progress:
        tqdm.write(line, file=sys.stderr)


def summary(method: Method, start: Start, left_out: Mapping[str, str]) -> str:
    """One line: how large the start is, and what was left out and why."""
    line, sizes = f"{type(method).__name__}: ", start.sizes
    if start.refusal is not None:
        line += f"plain LoRA: {start.refusal}"
    elif sizes:
        line += (
            f"{len(sizes)} layers started, |s B A| / |W| largest {max(sizes.values()):.2g}, "
            f"median {stats.median(sizes.values()):.2g}"
        )
    else:
        line += "PEFT's own start"
    if start.search is not None and start.refusal is None:
        line += f", calibration loss {start.search.start_loss:.4g} to {start.search.loss:.4g}"
    if left_out:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        line += f". Left at PEFT's start: {shown}{more}"
    return line
