"""`start_trainer` in several processes: one process's start, and the training of the ready model after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.distributed import trainer_scenarios
from tests.distributed.launch import launch, succeeded
from tests.life.words import tokenizer
from tests.statistics import models

pytest.importorskip("trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """What one process finds with a trainer and a method, which every kind of group is compared to."""

    @cache
    def found(which: str, name: str) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("alone")
        words = which, "alone", name, str(place / "run")
        (result,) = succeeded(launch(trainer_scenarios.trained, 1, place / "1", *words))
        return dict(result)

    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero3", marks=NEEDS_DEEPSPEED)])
@pytest.mark.parametrize(
    ("which", "name"), [("Trainer", "filet"), ("SFTTrainer", "filet"), ("SFTTrainer", "lora_da")]
)
def test_door_in_two_processes(
    which: str, kind: str, name: str, alone: Callable[[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    one, words = alone(which, name), (which, kind, name, str(tmp_path / "two"))
    first, second = succeeded(launch(trainer_scenarios.trained, 2, tmp_path / "2", *words))
    close(first["start"], one["start"], 1e-3)
    for key in ("start", "learned"):
        assert all(torch.equal(value, second[key][n]) for n, value in first[key].items())
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-3)
    for other in ("ready", "resumed"):
        check_same(first, first[other])
    folder = tmp_path / "two" / "door" / f"checkpoint-{trainer_scenarios.STEPS}"
    loaded = PeftModel.from_pretrained(models.llama(vocab_size=len(tokenizer())), folder)
    saved = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    for n, value in first["learned"].items():
        # An anchored adapter is saved with its start behind what it learned.
        rows, columns = value.shape
        assert torch.equal(saved[n][:rows, :columns], value), n


def check_same(door: dict[str, Any], other: dict[str, Any]) -> None:
    """Digit for digit."""
    assert door["losses"] == other["losses"]
    assert all(torch.equal(value, other["learned"][n]) for n, value in door["learned"].items())
