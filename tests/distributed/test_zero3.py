"""DeepSpeed's ZeRO-3: the same starts as one process finds, trained, saved, resumed, started again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorainit
from tests.distributed import scenarios
from tests.distributed import zero3_scenarios as zero3
from tests.distributed.launch import launch, succeeded

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
    pytest.mark.slow,
]

KINDS = ["engine", "init"]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        size = value.abs().max().clamp_min(1e-12)
        assert (found[name] - value).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(kind: str, tmp_path: Path) -> None:
    results = succeeded(launch(zero3.statistics, 2, tmp_path / "run", kind, str(tmp_path / "m")))
    expected = zero3.plain(
        lorainit.collect_statistics(
            zero3.models.llama(),
            scenarios.config(),
            data=scenarios.part(scenarios.RAGGED, [9], 0),
            needs={"gradient", "input_second_moment", "input_mean", "output_second_moment"},
            progress=False,
        )
    )
    for found in results[0]:
        for name, layer in expected.items():
            close(found[name], layer, 1e-5)
    # A control: one process's part of the data is not all of it.
    gradient = {n: layer["gradient"] for n, layer in expected.items()}
    part = lorainit.collect_statistics(
        zero3.models.llama(),
        scenarios.config(),
        data=scenarios.part(scenarios.RAGGED, [5, 4], 0),
        needs={"gradient"},
        progress=False,
    )
    with pytest.raises(AssertionError):
        close({n: layer.gradient for n, layer in part.items()}, gradient, 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_starts(kind: str, tmp_path: Path) -> None:
    """Anchored, displaced and zero-B starts."""
    names = ["lora_da", "filet", "pissa", "eva", "vanilla"]
    folder = str(tmp_path / "model")
    first, second = succeeded(launch(zero3.starts, 2, tmp_path / "run", kind, folder, names))
    for name in names:
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items())
        if name == "vanilla":
            continue  # PEFT's own random numbers
        alone = lorainit.get_peft_model(
            zero3.models.llama(),
            scenarios.config(),
            method=scenarios.METHODS[name](),
            data=scenarios.part(scenarios.RAGGED, [9], 0),
            progress=False,
        )
        close(first[name], scenarios.adapter(alone), 2e-3)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    """The same starts on all rows, and five steps."""
    found = {}
    for name in ("lora_da", "filet", "eva"):
        model = zero3.started(name, "", -1)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
        ids = torch.cat([row["input_ids"] for row in scenarios.part(scenarios.ROWS, [12], 0)])
        losses = []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        found[name] = losses
    return found


@pytest.mark.parametrize("name", ["lora_da", "filet", "eva"])
def test_training_goes_on(name: str, one_process: Any, tmp_path: Path) -> None:
    """Losses are the unsharded run's; a checkpoint resumes; stock PEFT loads what is saved."""
    first, second = succeeded(launch(zero3.training, 2, tmp_path / "run", str(tmp_path), name))
    assert first["losses"] == pytest.approx(one_process[name], rel=1e-4)
    assert first["losses"][-1] < first["losses"][0] - 0.01
    assert first["losses"] == second["losses"]
    assert first["resumed"] == pytest.approx(first["losses"][3:], rel=1e-6)
    for folder in ("trainer", "own"):
        logits = zero3.adapter_folder(tmp_path / folder)
        torch.testing.assert_close(logits, first["logits"], rtol=1e-4, atol=1e-5)
    plain = zero3.models.llama()(input_ids=zero3.FIRST).logits
    assert (plain - first["logits"]).abs().max() > 0.01


def test_a_partitioned_adapter_is_started_again(tmp_path: Path) -> None:
    first, _ = succeeded(launch(zero3.started_again, 2, tmp_path / "run", str(tmp_path)))
    for name, logits in first.items():
        loaded = zero3.adapter_folder(tmp_path / name)
        torch.testing.assert_close(loaded, logits, rtol=1e-4, atol=1e-5)
        alone = zero3.started(name, "", -1)
        with torch.no_grad():
            expected = alone(input_ids=zero3.FIRST).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_an_engine_with_an_optimizer_is_refused(tmp_path: Path) -> None:
    for text in succeeded(launch(zero3.refused, 2, tmp_path / "run", str(tmp_path / "m"))):
        assert "Start the adapter before deepspeed.initialize" in text


def test_an_error_leaves_nothing_gathered(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    first, second = succeeded(launch(zero3.loss_that_fails, 2, tmp_path / "run", folder))
    assert first.startswith("NonFiniteError")
    assert second.startswith("ProcessError: process 0 failed")
