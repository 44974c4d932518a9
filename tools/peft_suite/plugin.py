"""A pytest plugin: PEFT's tests with another start, and a line of JSON of each.

Settings come from the environment: ``PEFT_SUITE_KIND`` (of `starts.KINDS`) and ``PEFT_SUITE_RECORD``, the
file to append to.
"""

from __future__ import annotations

import collections
import inspect
import json
import os
import sys
from typing import Any

import peft
import pytest
import torch
from tools.peft_suite.starts import Replacement

_REPLACEMENT = Replacement(os.environ["PEFT_SUITE_KIND"])


class _Everything(collections.Counter):
    """Of PEFT's helper that goes to the hub the first time: every model was there before."""

    def __contains__(self, key: object) -> bool:
        return True


def pytest_configure(config: Any) -> None:
    torch.set_num_threads(1)
    _REPLACEMENT.install()
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{name}: of PEFT's")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out the cases of other methods than LoRA, and those of accelerators."""
    utilities = sys.modules.get("tests.testing_utils")
    if utilities is not None:
        utilities._HUB_MODEL_ACCESSES = _Everything()
    kept = [item for item in items if _of_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _of_lora(item: Any) -> bool:
    if any(item.iter_markers("single_gpu_tests")) or any(item.iter_markers("multi_gpu_tests")):
        return False
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    kinds = [v for v in values if inspect.isclass(v) and issubclass(v, peft.PeftConfig)]
    return all(kind is peft.LoraConfig for kind in kinds)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any, nextitem: Any) -> Any:
    _REPLACEMENT.begin()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if report.when == "call" or not report.passed:
        crash = getattr(report.longrepr, "reprcrash", None)
        line = {
            "test": item.nodeid,
            "outcome": report.outcome if report.when != "teardown" else "failed",
            "message": crash.message.splitlines()[0][:300] if crash and crash.message else "",
            "where": f"{os.path.basename(crash.path)}:{crash.lineno}" if crash else "",
            "started": _REPLACEMENT.counts["started"],
            "refused": _REPLACEMENT.counts["refused"],
            "reasons": sorted(set(_REPLACEMENT.reasons)),
        }
        with open(os.environ["PEFT_SUITE_RECORD"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report
