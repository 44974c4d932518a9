"""Processes that disagree, or of which one fails or is interrupted, all end with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import scenarios
from tests.distributed.launch import launch, succeeded

SECONDS = 20

TOGETHER = {
    "method": "do not agree on the method",
    "setting": "do not agree on the method",
    "loss_reduction": "do not agree on the loss_reduction",
    "token_mask": "do not agree on the token_mask",
    "max_sequences": "do not agree on the max_sequences",
    "rank": "do not agree on the peft_config",
    "alpha": "do not agree on the peft_config",
    "targets": "do not agree on the peft_config",
    "adapter_name": "do not agree on the adapter_name",
    "calibration_share": "do not agree on the calibration_share",
    "learning_rate": "do not agree on the learning_rate",
    "data": "do not agree on the data",
    "statistics": "do not agree on the statistics",
    "collect": "do not agree on the needs",
    "keyword": "unexpected keyword argument 'mask'",
    "bad rank": "r must be a whole number",
    "interrupt in data": "KeyboardInterrupt",
    "nothing": "",
}
"""What every process says; "nothing", the control, comes last, in the same group."""


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_disagreements_end_all_with_the_reason(size: int, tmp_path: Path) -> None:
    for found in succeeded(launch(scenarios.disagreeing, size, tmp_path, list(TOGETHER))):
        for (case, wanted), (seconds, text) in zip(TOGETHER.items(), found, strict=True):
            assert seconds < SECONDS, case
            assert wanted in text, (case, text)
            assert bool(text) is bool(wanted), (case, text)


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("case", "reason"),
    [("interrupt in solve", "KeyboardInterrupt"), ("error after data", "an accident")],
)
def test_one_that_fails_by_itself_ends_all(
    case: str, reason: str, size: int, tmp_path: Path
) -> None:
    last = size - 1
    results = succeeded(launch(scenarios.disagreeing, size, tmp_path, [case]))
    for rank, ((seconds, text),) in enumerate(results):
        assert seconds < SECONDS
        assert reason in text
        assert (f"process {last} failed" in text) is (rank != last)
