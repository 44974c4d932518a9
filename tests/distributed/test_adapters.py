"""A started adapter under DDP, FSDP1 and FSDP2: what it sends, its state dict, its factors (CASES C7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import adapter_scenarios as scenarios
from tests.distributed.launch import launch, succeeded


def test_ddp_sends_as_much_as_for_plain_lora(tmp_path: Path) -> None:
    for found in succeeded(launch(scenarios.ddp_traffic, 2, tmp_path)):
        gradients, buffers = found["vanilla"]
        assert gradients > 0
        assert all(found[name] == (gradients, buffers) for name in scenarios.STARTS)


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_state_dict_of_a_sharded_model(kind: str, tmp_path: Path) -> None:
    """The names and shapes that PEFT knows, and the values of an unsharded run."""
    first, _ = succeeded(launch(scenarios.sharded_states, 2, tmp_path, "ddp"))
    for states in succeeded(launch(scenarios.sharded_states, 2, tmp_path, kind)):
        for name in scenarios.STARTS:
            found, expected = states[name], first[name]
            assert found["after"].keys() == expected["after"].keys()
            moved = 0
            for key, value in expected["after"].items():
                torch.testing.assert_close(found["after"][key], value, rtol=1e-4, atol=1e-5)
                moved += not torch.equal(value, expected["before"][key])
            assert moved > 0


def test_a_sharded_factor_is_read_and_written_whole(tmp_path: Path) -> None:
    succeeded(launch(scenarios.sharded_weight, 2, tmp_path))
