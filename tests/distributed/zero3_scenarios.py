"""What each process does with a model that DeepSpeed's ZeRO-3 has partitioned, on a CPU."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorainit
from lorainit.adapters.wrappers import adapter_parameters
from lorainit.errors import LorainitError
from lorainit.parallel import collectives
from lorainit.parallel.partitioned import is_partitioned, partition_again
from tests.distributed.scenarios import METHODS, RAGGED, ROWS, config, part, plain
from tests.statistics import models

FIRST = ROWS[0]["input_ids"].view(1, -1)

STAGE3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def deepspeed() -> Any:
    """The package, on the CPU, with gloo alone: its own shared-memory operation would be compiled."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(collectives.world()[0])}
    warnings.simplefilter("ignore")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    return deepspeed


def model(kind: str, folder: str) -> Any:
    """In an engine without optimizer, or loaded in parts by transformers."""
    ds = deepspeed()
    if kind == "engine":
        return ds.initialize(model=models.llama(), config=STAGE3)[0]
    from transformers.integrations import HfDeepSpeedConfig

    if collectives.world()[0] == 0:
        models.llama().save_pretrained(folder)
    dist.barrier()
    stage3 = HfDeepSpeedConfig(STAGE3)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    del stage3
    return loaded


def factors(started: PeftModel) -> dict[str, Tensor]:
    """The adapter's trained halves; that they are ordinary parameters is part of it."""
    found = {n: p for n, p in started.named_parameters() if "lora_" in n}
    assert not any(map(is_partitioned, found.values()))
    return {name: p.detach().clone() for name, p in found.items()}


def parts(model: Any) -> dict[str, Tensor]:
    """This process's part of every base weight; nothing is gathered."""
    named = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert all(p.ds_status.name == "NOT_AVAILABLE" and p.numel() == 0 for p in named.values())
    return {n.replace(".base_layer", ""): p.ds_tensor.detach().clone() for n, p in named.items()}


def statistics(rank: int, size: int, kind: str, folder: str) -> list[dict[str, Any]]:
    """Of even and of uneven parts of the data."""
    found = []
    for split in ([5, 4], [9, 0]):
        own = model(kind, folder)
        before = parts(getattr(own, "module", own))
        hooks = [len(m._forward_pre_hooks) for m in own.modules()]
        given = lorainit.collect_statistics(
            own,
            config(),
            data=part(RAGGED, split, rank),
            needs={"gradient", "input_second_moment", "input_mean", "output_second_moment"},
            progress=False,
        )
        after = parts(getattr(own, "module", own))
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert hooks == [len(m._forward_pre_hooks) for m in own.modules()]
        found.append(plain(given))
    return found


def starts(rank: int, size: int, kind: str, folder: str, names: list[str]) -> dict[str, Any]:
    return {
        name: factors(
            lorainit.get_peft_model(
                model(kind, folder),
                config(),
                method=METHODS[name](),
                data=part(RAGGED, [5, 4], rank),
                progress=False,
            )
        )
        for name in names
    }


def started(name: str, folder: str, rank: int) -> PeftModel:
    """A start that does not depend on the number of processes, but by the order of sums."""
    base = model("init", folder) if rank >= 0 else models.llama()
    rows = part(ROWS, [6, 6], rank) if rank >= 0 else part(ROWS, [12], 0)
    return lorainit.get_peft_model(
        base, config(), method=METHODS[name](), data=rows, progress=False
    )


def engine_of(started: PeftModel) -> Any:
    """For training, as a Trainer makes it."""
    learning = [p for p in started.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0)
    return deepspeed().initialize(
        model=started, optimizer=optimizer, model_parameters=learning, config=STAGE3
    )[0]


def steps(engine: Any, rank: int, count: int) -> list[float]:
    """Mean losses over the processes; each has half of the rows, all of one length."""
    ids = torch.cat([row["input_ids"] for row in part(ROWS, [6, 6], rank)])
    losses = []
    for _ in range(count):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(collectives.sum_counts([float(loss.detach())])[0] / 2)
    return losses


def training(rank: int, size: int, folder: str, name: str) -> dict[str, Any]:
    """Training under ZeRO-3, its checkpoint, and what is saved of it."""
    engine = engine_of(started(name, f"{folder}/base", rank))
    losses = steps(engine, rank, 3)
    engine.save_checkpoint(f"{folder}/checkpoint", tag="three")
    losses += steps(engine, rank, 2)
    # As transformers' Trainer saves it.
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:
        engine.module.save_pretrained(f"{folder}/trainer", state_dict=state)
    lorainit.save_adapter(engine.module, f"{folder}/own")
    logits = engine(input_ids=FIRST).logits.detach().clone()
    engine.destroy()
    resumed = engine_of(started(name, f"{folder}/base", rank))
    resumed.load_checkpoint(f"{folder}/checkpoint", tag="three")
    return {"losses": losses, "resumed": steps(resumed, rank, 2), "logits": logits}


def started_again(rank: int, size: int, folder: str) -> dict[str, Any]:
    """An adapter that is partitioned itself, started by one method after another, anchored and not."""
    first = started("vanilla", folder, rank)
    engine = deepspeed().initialize(model=first, config=STAGE3)[0]
    found: dict[str, Any] = {}
    for name in ("filet", "lora_da", "pissa"):
        again = lorainit.get_peft_model(
            engine, None, method=METHODS[name](), data=part(ROWS, [6, 6], rank), progress=False
        )
        own = adapter_parameters(again, "default")
        assert all(map(is_partitioned, own))
        assert all(p.numel() == 0 for p in own)
        lorainit.save_adapter(again, f"{folder}/{name}")
        found[name] = engine(input_ids=FIRST).logits.detach().clone()
        partition_again(again)
    return found


def refused(rank: int, size: int, folder: str) -> str:
    engine = engine_of(started("vanilla", folder, rank))
    try:
        lorainit.get_peft_model(engine, None, method=lorainit.PiSSA())
    except LorainitError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def loss_that_fails(rank: int, size: int, folder: str) -> str:
    """On one process: all raise, nothing stays gathered, and the model serves again."""
    own = model("init", folder)
    before = parts(own)

    def loss_fn(inner: Any, batch: Any) -> Tensor:
        logits: Tensor = inner(input_ids=batch["input_ids"]).logits
        return logits.mean((1, 2)) * (float("nan") if rank == 0 else 1.0)

    rows = part(ROWS, [6, 6], rank)
    how: dict[str, Any] = {"method": lorainit.LoraDA(), "data": rows, "progress": False}
    try:
        lorainit.get_peft_model(own, config(), loss_fn=loss_fn, **how)
    except LorainitError as error:
        after = parts(own)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        lorainit.get_peft_model(own, config(), **how)
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def adapter_folder(folder: Path) -> Tensor:
    """Logits of the plain base with an adapter that stock PEFT loads."""
    loaded = PeftModel.from_pretrained(models.llama(), folder)
    with torch.no_grad():
        logits: Tensor = loaded(input_ids=FIRST).logits
    return logits
