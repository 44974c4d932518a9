"""What each process does with a started adapter under PyTorch's wrappers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorainit
from tests.distributed.scenarios import METHODS, ROWS, config, part, sharded, whole
from tests.statistics import models
from tests.statistics.models import batches

STARTS = ("eva", "lora_da", "pissa")
"""With B = 0, displaced, anchored."""


def started(name: str) -> PeftModel:
    return lorainit.get_peft_model(
        models.llama(), config(), method=METHODS[name](), data=batches(ROWS, 2), progress=False
    )


def batch(rank: int, size: int) -> dict[str, Tensor]:
    rows = part(ROWS, [len(ROWS) // size] * size, rank)
    ids = torch.cat([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def ddp_traffic(rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Numbers sent in three steps: gradients, and buffers before every forward."""
    found = {}
    for name in (*STARTS, "vanilla"):
        run = DistributedDataParallel(started(name))
        sent = [0, 0]
        original = run._sync_buffers

        def buffers(run: Any = run, sent: list[int] = sent, original: Any = original) -> None:
            sent[1] += sum(buffer.numel() for buffer in run.modules_buffers)
            original()

        def gradients(state: list[int], bucket: Any) -> Any:
            state[0] += bucket.buffer().numel()
            return (
                dist.all_reduce(bucket.buffer(), async_op=True)
                .get_future()
                .then(lambda done: done.value()[0] / size)
            )

        run._sync_buffers = buffers
        gradients.__annotations__.clear()  # DDP compares them with types, not with their names
        run.register_comm_hook(sent, gradients)
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            run(**batch(rank, size)).loss.backward()
            optimizer.step()
        found[name] = (sent[0], sent[1])
    return found


def sharded_states(rank: int, size: int, kind: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """By start, a step of training under a wrapper and the whole state dict that it gives."""
    return {name: _sharded_state(rank, size, kind, name) for name in STARTS}


def _sharded_state(rank: int, size: int, kind: str, name: str) -> dict[str, dict[str, Tensor]]:
    model = started(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run: Any = model
    if kind == "fsdp1":
        run = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif kind == "fsdp2":
        sharded(model)
    else:
        run = DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.1)
    run(**batch(rank, size)).loss.backward()
    optimizer.step()
    if kind == "fsdp1":
        state = run.state_dict()
    else:
        options = StateDictOptions(full_state_dict=True)
        state = (
            get_model_state_dict(model, options=options) if kind == "fsdp2" else model.state_dict()
        )
    after = {k: whole(v) for k, v in state.items()}
    if kind != "ddp":
        # And back, into the wrapped model.
        run.load_state_dict(
            before
            if kind == "fsdp1"
            else {k: _like(v, state_of(model)[k]) for k, v in before.items()}
        )
        again = run.state_dict()
        for key, value in before.items():
            torch.testing.assert_close(whole(again[key]), value, rtol=0, atol=0)
    return {"before": before, "after": after}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def _like(value: Tensor, like: Tensor) -> Tensor:
    from lorainit.adapters.anchor import placed_like

    return placed_like(value, like)


def sharded_weight(rank: int, size: int) -> dict[str, Tensor]:
    """Reading and writing a factor that is sharded, by PEFT's name of it."""
    model = started("pissa")
    inputs = batch(0, 1)
    with torch.no_grad():
        base = models.llama()(**inputs).logits
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    wholes = [m.lora_A["default"].weight.detach().clone() for m in layers]
    for block in (m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"):
        fully_shard(block)
    fully_shard(model)
    for layer, expected in zip(layers, wholes, strict=True):
        weight = layer.lora_A["default"].weight
        assert weight.shape == expected.shape
        assert torch.equal(weight.full_tensor(), expected)
        layer.lora_B["default"].weight.data.zero_()
        assert not layer.lora_B["default"].anchor.any()
        layer.lora_A["default"].weight.data.mul_(2)
        assert torch.equal(layer.lora_A["default"].weight.full_tensor(), 2 * expected)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, base)
    return {}
