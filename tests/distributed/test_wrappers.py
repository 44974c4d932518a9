"""Wrappers and placements in one process: seen through, read, or refused with the way round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorainit
from lorainit.adapters.wrappers import unwrapped
from lorainit.parallel.collectives import parts_of_cap
from tests.distributed.scenarios import METHODS, RAGGED, config
from tests.statistics import models
from tests.statistics.models import batches


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(lorainit.errors.AdapterError, match="fully_shard"):
        unwrapped(FullyShardedDataParallel(models.llama()))


def test_data_parallel_is_seen_through() -> None:
    model = models.llama()
    assert unwrapped(nn.DataParallel(model)) is model


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload", "dispatch"])
@pytest.mark.parametrize("name", ["lora_da", "filet", "natural"])
def test_offloaded_by_accelerate(where: str, name: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    data = batches(RAGGED, 3)
    expected = lorainit.get_peft_model(
        models.llama(), config(), method=METHODS[name](), data=data, progress=False
    )
    model = models.llama()
    if where == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        places |= {"model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
        model = accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path)
        )
    found = lorainit.get_peft_model(
        model, config(), method=METHODS[name](), data=data, progress=False
    )
    mine = dict(found.named_parameters()) | dict(found.named_buffers())
    for key, value in expected.named_parameters():
        if "lora_" in key:
            assert not mine[key].is_meta, key
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        batch = {k: v for k, v in data[0].items() if k != "labels"}
        torch.testing.assert_close(
            found(**batch).logits, expected(**batch).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("cap", "available", "open_ended", "given"),
    [
        (9, [3, 3, 3], [True, True, True], [3, 3, 3]),
        (10, [9, 0, 2], [True, False, False], [8, 0, 2]),
        (10, [1, 1, 1], [False, False, False], [1, 1, 1]),
        (2, [1, 1, 0], [True, True, True], [1, 1, 0]),
        (7, [0, 4, 2], [False, True, False], [0, 5, 2]),
        (0, [1], [True], [0]),
    ],
)
def test_allotments(
    cap: int, available: list[int], open_ended: list[bool], given: list[int]
) -> None:
    assert parts_of_cap(cap, available, open_ended) == given
