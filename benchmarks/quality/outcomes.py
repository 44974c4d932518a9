"""What is evaluated in a run, and what a record says of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality.data.pools import Pool
from benchmarks.quality.experiment import CURVE_PERCENT, Experiment, curve_steps, percent_steps
from benchmarks.quality.initialization import Initialised
from benchmarks.quality.records import Record
from benchmarks.quality.training.trainer import Outcome

CURVE_ROWS = 128


def evaluations(
    first: Experiment, pools: dict[str, Pool], stage: str, validation_rows: int, test_rows: int
) -> dict[str, Any]:
    """What is evaluated, and when: a search looks seldom, and at the validation split only.

    Args:
        first: of the stack.
        pools: of its task.
        stage: ``"search"``, or another.
        validation_rows: how many validation sequences are scored at the end.
        test_rows: the same of the test split; zero: none.
    """
    searching = stage == "search"
    scores = {"validation": pools["validation"].first(validation_rows)}
    if test_rows:
        scores["test"] = pools["test"].first(test_rows)
    other = {}
    if "other" in pools and not searching:
        other = {"other": pools["other"].first(validation_rows)}
    return {
        "curve": pools["validation"].first(min(CURVE_ROWS, validation_rows)),
        "curve_at": (percent_steps if searching else curve_steps)(first.steps),
        "scores": scores | other,
        "start_scores": other,
    }


def measured(
    experiment: Experiment, found: Initialised, outcome: Outcome, memory: int | None
) -> Record:
    """The part of a record that a run gives."""
    curve = outcome.curve
    percent = {p: curve[-(-experiment.steps * p // 100)] for p in CURVE_PERCENT}
    record: Record = {
        "anchored": found.start.anchored,
        "init_seconds": found.seconds,
        "collect_seconds": found.collect_seconds,
        "solve_seconds": found.solve_seconds,
        "train_seconds": outcome.train_seconds / outcome.stack,
        "stack": outcome.stack,
        "stack_train_seconds": outcome.train_seconds,
        "stack_evaluate_seconds": outcome.evaluate_seconds,
        "memory_bytes": memory,
        "diverged": not outcome.finite,
        "train_loss": outcome.train_loss,
        "heldout": {"steps": list(curve), "loss": list(curve.values())},
        "heldout_at_percent": percent,
    }
    if found.suggested is not None:
        record["suggested_rate"] = found.suggested
    for split, (losses, exact) in outcome.scores.items():
        record[split] = {
            "loss": float(losses.mean()),
            "exact": float(exact.mean()),
            "sequences": len(losses),
        }
    if "test" in outcome.scores:
        losses, exact = outcome.scores["test"]
        # Items are the same in every run of a task, so two runs can be compared item by item.
        record["test"]["loss_error"] = float(losses.std() / len(losses) ** 0.5)
        record["test"]["items"] = np.packbits(exact.cpu().numpy() > 0).tobytes().hex()
    if "other" in outcome.start_scores:
        record["other"]["start_loss"] = float(outcome.start_scores["other"][0].mean())
    return record
