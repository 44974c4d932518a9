"""What each process does: the same lines as a user's script under torchrun."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorainit
from lorainit.adapters.anchor import placed_like
from lorainit.adapters.layers import true_config
from lorainit.calibration.fit_heads import DECAYS, fit_heads
from lorainit.errors import LorainitError
from lorainit.linalg.block_triangle import mirror, panels
from lorainit.parallel import collectives, exchange
from lorainit.parallel.sharding import is_sharded
from lorainit.statistics.memory.peak import held_bytes
from lorainit.types import STATISTICS
from tests.adapters import tiny
from tests.pipeline import classifiers
from tests.statistics import models
from tests.statistics.models import Batch, batches, sequences

ROWS = sequences(12, shortest=6, longest=6)
"""Of one length, so that a mean over processes is the mean over sequences."""

RAGGED = sequences(9)

METHODS: dict[str, Any] = {
    "lora_da": lambda: lorainit.LoraDA(),
    "filet": lambda: lorainit.FILet(),
    "pissa": lambda: lorainit.PiSSA(),
    # Ranks stay as configured: those of an adapter that is there already cannot move.
    "eva": lambda: lorainit.EVA(rho=1.0),
    "vanilla": lambda: lorainit.Vanilla(),
    # At the edge of its region a layer stands still, and rounding may choose between lengths.
    "natural": lambda: lorainit.Natural(steps=2, trust_region=10.0),
    # Nothing takes so much of the loss away: plain LoRA, decided alike on all processes.
    "auto": lambda: lorainit.Auto(least_gain=0.9),
}

SPLITS: dict[int, list[list[int]]] = {
    1: [[9]],
    2: [[5, 4], [7, 2], [9, 0], [0, 9]],
    3: [[3, 3, 3], [5, 4, 0], [0, 1, 8]],
}
"""How many of the ragged rows each process has, one after the other."""


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", **settings)


def part(rows: Sequence[Batch], counts: Sequence[int], rank: int) -> list[Batch]:
    first = sum(counts[:rank])
    return batches(rows[first : first + counts[rank]], 2)


def even(size: int) -> list[int]:
    return [len(ROWS) // size] * size


def sharded(model: Any) -> Any:
    """As trainers do it: each block, then the rest."""
    for layer in models_layers(model):
        fully_shard(layer)
    fully_shard(model)
    return model


def models_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]


def plain(statistics: lorainit.Statistics) -> dict[str, dict[str, Tensor]]:
    return {
        name: {
            key: torch.as_tensor(getattr(layer, key))
            for key in (
                "gradient",
                "input_second_moment",
                "input_mean",
                "output_second_moment",
                "sequences",
                "label_tokens",
                "positions",
            )
        }
        for name, layer in statistics.items()
    }


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def adapter(model: PeftModel) -> dict[str, Tensor]:
    return {n: whole(p) for n, p in model.named_parameters() if "lora_" in n}


def wrapped(kind: str, **settings: Any) -> Any:
    model = models.llama(**settings)
    if kind == "ddp":
        return DistributedDataParallel(model)
    return sharded(model) if kind == "fsdp" else model


def statistics_of_splits(rank: int, size: int, kind: str) -> list[dict[str, Any]]:
    found = []
    for split in SPLITS[size]:
        model = wrapped(kind)
        before = {n: (p.requires_grad, whole(p)) for n, p in model.named_parameters()}
        statistics = lorainit.collect_statistics(
            model, config(), data=part(RAGGED, split, rank), needs=STATISTICS, progress=False
        )
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == before[name][0]
            assert torch.equal(whole(parameter), before[name][1])
            assert parameter.grad is None
        found.append(plain(statistics))
    # Neither a backward: EVA reads inputs alone.
    model = wrapped(kind)
    inputs = lorainit.collect_statistics(
        model, config(), data=part(RAGGED, split, rank), needs=lorainit.EVA().needs, progress=False
    )
    found.append({n: {"mean": layer.input_second_moment} for n, layer in inputs.items()})
    return found


def statistics_by_blocks(rank: int, size: int, split: list[int]) -> dict[str, dict[str, Tensor]]:
    """Within a budget that one pass block by block fits, and one whole pass does not."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lorainit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = models.llama()
    budget = held_bytes(model, torch.device("cpu")) + 60_000
    found = lorainit.collect_statistics(
        model,
        config(),
        data=part(RAGGED, split, rank),
        needs=STATISTICS,
        max_memory=budget,
        progress=False,
    )
    assert any("block by block, 2 blocks" in line for line in said), said
    return plain(found)


TRAVELLERS: dict[str, tuple[tuple[int, ...], torch.dtype, bool]] = {
    "wide": ((5, 37), torch.float32, False),
    "square": ((600, 600), torch.float32, True),
    "small": ((3, 3), torch.float64, True),
    "one": ((1, 1), torch.float32, True),
    "vector": ((11,), torch.float32, False),
    "stack": ((2, 3, 4), torch.float64, False),
    "nobody's": ((2, 2), torch.float32, False),
}
"""Shape, dtype, whether folded."""


def traveller(name: str, rank: int) -> Tensor | None:
    """A process's part; some have none."""
    shape, dtype, folded = TRAVELLERS[name]
    if name == "nobody's" or (name == "wide" and rank == 1):
        return None
    generator = torch.Generator().manual_seed(rank)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return tensor + tensor.mT if folded else tensor


def travelling(rank: int, size: int, nbytes: int) -> dict[str, dict[str, Tensor]]:
    """To the owners, and from them to all, in buffers of so many bytes."""
    exchange.BUFFER_BYTES = exchange.SEGMENT_BYTES = nbytes
    slots = [
        exchange.Slot(name, index % size, *TRAVELLERS[name])
        for index, name in enumerate(TRAVELLERS)
    ]
    tensors = {name: t for name in TRAVELLERS if (t := traveller(name, rank)) is not None}
    for low, high in panels(600):
        tensors["square"][high:, low:high] = torch.nan
    cpu = torch.device("cpu")
    exchange.reduce_to_owners(tensors, slots, cpu)
    assert set(tensors) == {slot.key for slot in slots if slot.owner == rank}
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    exchange.broadcast_from_owners(tensors, slots, cpu)
    for tensor in (*tensors.values(), *owned.values()):
        if tensor.shape == (600, 600):
            mirror(tensor)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in owned.items())
    return {"owned": set(owned), "all": tensors}


def shared_out(rank: int, size: int, folder: str) -> dict[str, Any]:
    """Statistics that stay where they are solved: gathered, saved, loaded and started from."""
    how: dict[str, Any] = {"needs": lorainit.Natural().needs, "progress": False}
    data = part(RAGGED, SPLITS[size][0], rank)
    whole = lorainit.collect_statistics(models.llama(), config(), data=data, **how)
    mine = lorainit.collect_statistics(models.llama(), config(), data=data, gather=False, **how)
    assert mine.shares is not None
    assert mine.names == list(whole)
    assert set(mine) == {n for n, owner in mine.shares.owners.items() if owner == rank}
    assert_same(mine.gathered(), whole)
    path = f"{folder}/statistics.safetensors"
    mine.save(path)
    loaded = lorainit.Statistics.load(path)
    assert_same(loaded, whole)
    assert list(loaded.fingerprints) == list(whole)
    again = lorainit.Statistics.load(path, gather=False)
    assert again.shares is not None
    assert again.names == mine.names
    assert again.nbytes < whole.nbytes
    starts_found = [
        adapter(
            lorainit.get_peft_model(
                models.llama(), config(), method=method, statistics=given, progress=False
            )
        )
        for method in (lorainit.LoraDA(), lorainit.Natural(rho=2.0))
        for given in (whole, mine, again)
    ]
    messages = []
    for work in (
        lambda: mine[next(n for n in mine.names if n not in mine)],
        lambda: mine.save(f"{path}/inside/a/file"),
        lambda: started_alone(mine),
    ):
        try:
            work()
        except (KeyError, OSError, LorainitError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return {
        "nbytes": (mine.nbytes, whole.nbytes),
        "starts": starts_found,
        "messages": messages,
    }


def started_alone(statistics: lorainit.Statistics) -> None:
    with collectives.single_process():
        lorainit.get_peft_model(
            models.llama(), config(), method=lorainit.LoraDA(), statistics=statistics
        )


def assert_same(found: lorainit.Statistics, expected: lorainit.Statistics) -> None:
    assert found.shares is None
    assert list(found) == list(expected)
    assert found.metadata == expected.metadata
    for name, layer in expected.items():
        for key in layer.TENSORS:
            mine, other = getattr(found[name], key), getattr(layer, key)
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
        for key in (*layer.COUNTS, "loss_reduction", "population"):
            assert getattr(found[name], key) == getattr(layer, key)


def caps(rank: int, size: int, split: list[int], cap: int) -> tuple[float, int]:
    drawn = 0

    def data() -> Iterator[Batch]:
        nonlocal drawn
        for batch in batches(RAGGED[sum(split[:rank]) : sum(split[: rank + 1])], 1):
            drawn += 1
            yield batch

    statistics = lorainit.collect_statistics(
        models.llama(),
        config(),
        data=data(),
        needs={"gradient"},
        max_sequences=cap,
        progress=False,
    )
    return statistics.metadata["sequences"], drawn


def starts(rank: int, size: int, kind: str, names: Sequence[str]) -> dict[str, Any]:
    """Adapters by method; each is trained for four steps."""
    found: dict[str, Any] = {}
    for name in names:
        data = part(ROWS, even(size), rank)
        if kind == "fsdp_adapter":
            # The adapter is there and sharded with its base; lorainit starts it again.
            model = sharded(get_peft_model(models.llama(), config()))
            given = None
        else:
            model, given = wrapped(kind), config()
        model = lorainit.get_peft_model(
            model, given, method=METHODS[name](), data=data, progress=False
        )
        assert isinstance(model, PeftModel)
        kinds = {hasattr(p, "device_mesh") for n, p in model.named_parameters() if "lora_" in n}
        assert kinds == {kind == "fsdp_adapter"}
        start = adapter(model)
        if kind == "fsdp_after":
            sharded(model)
            assert is_sharded(model)
            again = adapter(model)
            state = model.state_dict()
            for key, value in start.items():
                assert torch.equal(again[key], value)
            assert all(not torch.isnan(whole(v)).any() for v in state.values())
        found[name] = (start, train(model, rank, size))
    return found


def ranked_and_turned(rank: int, size: int, kind: str) -> list[dict[str, Tensor]]:
    """Adapters whose ranks read the weight too, and whose directions follow from it."""
    methods = lorainit.FARSS(early_blocks=1), lorainit.Random(like=lorainit.LoraDA(population=9.0))
    return [
        adapter(
            lorainit.get_peft_model(
                wrapped(kind),
                LoraConfig(r=8, target_modules="all-linear"),
                method=method,
                data=part(ROWS, even(size), rank),
                progress=False,
            )
        )
        for method in methods
    ]


def given_back(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    """Starts of a base whose weights were rounded, by methods that read what that took."""
    found = {}
    for method in (lorainit.LoftQ(), lorainit.QERA(), lorainit.Auto(least_gain=0.0)):
        full, base = models.llama(), models.llama()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "proj" in name:
                    step = parameter.abs().max() / 2
                    parameter.copy_((parameter / step).round() * step)
        model = lorainit.get_peft_model(
            base,
            config(),
            method=method,
            data=part(ROWS, even(size), rank),
            reference_weights=full,
            progress=False,
        )
        found[type(method).__name__] = adapter(model)
    return found


def of_one_shape(rank: int, size: int, kind: str) -> list[dict[str, Tensor]]:
    """Layers of one shape, of which some share an input, which only the owner of their statistics knows."""
    return [
        adapter(
            lorainit.get_peft_model(
                wrapped(kind, num_key_value_heads=4),
                config(),
                method=method,
                data=part(ROWS, even(size), rank),
                progress=False,
            )
        )
        for method in (
            lorainit.EVA(rho=2.0),
            lorainit.CorDA(),
            lorainit.Natural(rho=2.0, length=1.0),
        )
    ]


def ranked_by_error(rank: int, size: int, kind: str) -> list[dict[str, Tensor]]:
    """An adapter whose ranks follow from what quantization took of each layer, of a sharded base too."""
    full = models.llama(num_key_value_heads=4)
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            drawn = torch.Generator().manual_seed(len(name))
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=drawn))
    return [
        adapter(
            lorainit.get_peft_model(
                wrapped(kind, num_key_value_heads=4),
                config(),
                method=lorainit.KroneckerQER(rho=2),
                data=part(ROWS, even(size), rank),
                reference_weights=full,
                progress=False,
            )
        )
    ]


def train(model: Any, rank: int, size: int) -> list[float]:
    """Four steps on all rows; gradients are averaged by the wrapper, or here where there is none."""
    torch.manual_seed(0)
    learning = [p for p in model.parameters() if p.requires_grad]
    unsynchronized = [p for p in learning if not hasattr(p, "device_mesh")]
    run: Any = model
    if size > 1 and not any(isinstance(m, FSDPModule) for m in model.modules()):
        run = DistributedDataParallel(model)
        unsynchronized = []
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    rows = part(ROWS, even(size), rank)
    whole_batch = {
        "input_ids": torch.cat([b["input_ids"] for b in rows]),
    }
    whole_batch["labels"] = whole_batch["input_ids"]
    losses = []
    for _ in range(4):
        loss = run(**whole_batch).loss
        optimizer.zero_grad()
        loss.backward()
        if size > 1:
            for parameter in unsynchronized:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        losses.append(collectives.sum_counts([float(loss.detach())])[0] / size)
    return losses


# --- failures -----------------------------------------------------------------------------------


def failing_data(rank: int, size: int, where: str) -> None:
    def data() -> Iterator[Batch]:
        for index, batch in enumerate(batches(RAGGED, 1)):
            if rank == size - 1 and index == 1:
                if where == "dies":
                    os._exit(3)
                raise OSError("the disk is gone")
            yield batch

    lorainit.get_peft_model(
        models.llama(), config(), method=lorainit.LoraDA(), data=data(), progress=False
    )


def failing_loss(rank: int, size: int, kind: str) -> str:
    """A loss that is not finite on one process: all raise, and the model is as it was."""
    model = wrapped(kind)

    def loss_fn(inner: nn.Module, batch: Any) -> Tensor:
        logits = inner(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits.float().mean((1, 2)) * (float("nan") if rank == 0 else 1.0)

    try:
        lorainit.get_peft_model(
            model,
            config(),
            method=lorainit.LoraDA(),
            data=part(ROWS, even(size), rank),
            loss_fn=loss_fn,
            progress=False,
        )
    except LorainitError as error:
        assert not any("lora_" in n for n, _ in model.named_parameters())
        # The group still works, and so does the model.
        lorainit.collect_statistics(
            model, config(), data=part(ROWS, even(size), rank), needs={"gradient"}, progress=False
        )
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def skipping(rank: int, size: int, kind: str) -> tuple[dict[str, Any], float]:
    """Two sequences of one process are not finite, and left out; the other has none."""

    def loss_fn(inner: nn.Module, batch: Any) -> Tensor:
        logits = inner(**{k: v for k, v in batch.items() if k != "labels"}).logits
        mask = batch["attention_mask"]
        losses = (logits.float() * mask[..., None]).sum((1, 2)) / mask.sum(1)
        return losses.masked_fill(bad_rows(batch), float("nan"))

    found = lorainit.collect_statistics(
        wrapped(kind),
        config(),
        data=part(RAGGED, SPLITS[size][0], rank),
        needs=STATISTICS,
        loss_fn=loss_fn,
        on_nonfinite="skip",
        progress=False,
    )
    return plain(found), found.metadata["skipped_sequences"]


def bad_rows(batch: Any) -> Tensor:
    """Those that begin as the second and the third of all do."""
    firsts = torch.stack([RAGGED[index]["input_ids"][:3] for index in (1, 2)])
    return (batch["input_ids"][:, None, :3] == firsts).all(-1).any(-1)


class _Stubborn(lorainit.PiSSA):
    """Cannot solve one shape of layer."""

    def solve(self, weight: Tensor, *args: Any) -> Any:
        if weight.shape[-2:] == (8, 16):
            raise lorainit.errors.FactorizationError("no")
        return super().solve(weight, *args)


def failing_solve(rank: int, size: int, kind: str) -> str:
    try:
        lorainit.get_peft_model(wrapped(kind), config(), method=_Stubborn(), progress=False)
    except LorainitError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def different_weights(rank: int, size: int) -> None:
    lorainit.collect_statistics(
        models.llama(seed=rank), config(), data=batches(RAGGED, 2), needs={"gradient"}
    )


def by_oneself(rank: int, size: int) -> float:
    """Only one process collects, and has been told that it is alone."""
    if rank:
        return 0.0
    with collectives.single_process():
        found = lorainit.collect_statistics(
            models.llama(), config(), data=batches(RAGGED, 2), needs={"gradient"}, progress=False
        )
    return float(found.metadata["sequences"])


def anchored_over_shards(rank: int, size: int) -> dict[str, Any]:
    """An adapter that is sharded already gets an anchor, is trained, saved, loaded, started again."""
    data = part(ROWS, even(size), rank)
    ids = {"input_ids": data[0]["input_ids"]}
    base = models.llama()
    with torch.no_grad():
        before = base(**ids).logits
    model = sharded(get_peft_model(base, config(use_rslora=True)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def start(method: Any) -> None:
        lorainit.get_peft_model(model, None, method=method, data=data, progress=False)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids["input_ids"], labels=ids["input_ids"]).loss.backward()
        optimizer.step()

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**ids).logits

    start(lorainit.PiSSA())
    assert torch.equal(logits(), before)
    assert true_config(model, "default").r == 2
    # The optimizer was there before and holds the same parameters.
    step()
    moved = logits()
    assert not torch.equal(moved, before)
    # What is saved is plain LoRA of twice the rank.
    state = {k: whole(v) for k, v in model.state_dict().items() if "lora_" in k}
    assert all(k.endswith(("lora_A.default.weight", "lora_B.default.weight")) for k in state)
    fresh = get_peft_model(
        models.llama(),
        LoraConfig(r=4, lora_alpha=alpha(model), use_rslora=True, target_modules="all-linear"),
    )
    fresh.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.allclose(fresh(**ids).logits, moved, atol=1e-5)
    start(lorainit.MiLoRA())
    assert torch.equal(logits(), before)
    model.load_state_dict(
        {k: placed_like(v, model.state_dict()[k]) for k, v in state.items()}, strict=False
    )
    assert torch.allclose(logits(), moved, atol=1e-5)
    start(lorainit.LoraDA())
    displaced = lorainit.get_peft_model(
        models.llama(), config(use_rslora=True), method=lorainit.LoraDA(), data=data, progress=False
    )
    with torch.no_grad():
        assert torch.allclose(logits(), displaced(**ids).logits, atol=1e-5)
    step()
    return {k: whole(v) for k, v in model.state_dict().items() if "lora_" in k}


def alpha(model: PeftModel) -> int:
    found = model.peft_config["default"].lora_alpha
    assert isinstance(found, int | float)
    return found


def factor_sharded_by_itself(rank: int, size: int) -> None:
    model = get_peft_model(models.llama(), config())
    for module in model.modules():
        if isinstance(module, LoraLayer):
            fully_shard(module.lora_A["default"])
    sharded(model)
    lorainit.get_peft_model(model, None, method=lorainit.PiSSA(), progress=False)


# --- processes that disagree --------------------------------------------------------------------


def disagreeing(rank: int, size: int, cases: Sequence[str]) -> list[tuple[float, str]]:
    """Seconds until each case ended here, and what was raised."""
    return [_disagree(case, rank, size) for case in cases]


def _disagree(case: str, rank: int, size: int) -> tuple[float, str]:
    odd = rank == size - 1
    model = models.llama()
    names = ["q_proj"] if odd and case == "targets" else ["q_proj", "up_proj"]
    settings: dict[str, Any] = {"r": 3 if odd and case == "rank" else 2, "lora_alpha": 4}
    if odd and case in ("alpha", "bad rank"):
        settings |= {"lora_alpha": 5} if case == "alpha" else {"r": 0}
    peft_config = LoraConfig(target_modules=names, **settings)
    arguments: dict[str, Any] = {"method": lorainit.LoraDA(), "data": batches(ROWS, 2)}
    arguments |= {"progress": odd, "max_memory": "4GB" if odd else "5GB"}
    own: dict[str, dict[str, Any]] = {
        "method": {"method": lorainit.LoraOne()},
        "setting": {"method": lorainit.LoraDA(gamma=8)},
        "loss_reduction": {"loss_reduction": "token"},
        "token_mask": {"token_mask": "labels"},
        "max_sequences": {"max_sequences": 7},
        "adapter_name": {"adapter_name": "other"},
        "calibration_share": {"calibration_share": 0.5},
        "learning_rate": {"learning_rate": 1e-4},
        "data": {"method": lorainit.PiSSA(), "data": None},
        "keyword": {"mask": "labels"},
        "interrupt in data": {"data": _interrupted()},
    }
    if case == "data":
        arguments["method"] = lorainit.PiSSA()
    if case == "statistics":
        arguments |= {"method": lorainit.LoraOne(), "data": None}
        arguments["statistics"] = _collected(model, peft_config, 2.0 if odd else 1.0)
    if odd:
        arguments |= own.get(case, {})
    if case == "interrupt in solve":
        arguments = {"method": _Interrupted() if odd else _Calm(), "progress": False}
    patch = pytest.MonkeyPatch()
    if case == "error after data" and odd:
        module = importlib.import_module("lorainit.pipeline.get_peft_model")
        patch.setattr(module, "adapter_tensors", _accident)
    begin = time.monotonic()
    try:
        if case == "collect":
            needs = {"gradient"} if odd else {"input_mean"}
            lorainit.collect_statistics(model, peft_config, data=batches(ROWS, 2), needs=needs)
        else:
            lorainit.get_peft_model(model, peft_config, **arguments)
    except (Exception, KeyboardInterrupt) as error:
        return time.monotonic() - begin, f"{type(error).__name__}: {error}"
    finally:
        patch.undo()
    return time.monotonic() - begin, ""


def _collected(model: nn.Module, peft_config: LoraConfig, scale: float) -> lorainit.Statistics:
    """By this process alone; the counts are the same for every scale, the sums are not."""
    with collectives.single_process():
        found = lorainit.collect_statistics(
            model, peft_config, data=batches(ROWS, 2), needs={"gradient"}, progress=False
        )
    scaled = {
        name: dataclasses.replace(layer, gradient_sum=layer.gradient_sum * scale)
        for name, layer in found.items()
    }
    result = lorainit.Statistics(scaled)
    result.fingerprints = found.fingerprints
    return result


def _interrupted() -> Iterator[Batch]:
    yield batches(ROWS, 2)[0]
    raise KeyboardInterrupt


def _accident(*_: Any) -> Any:
    raise RuntimeError("an accident")


class _Calm(lorainit.PiSSA):
    """As its parent."""


class _Interrupted(lorainit.PiSSA):
    """Ctrl-C in the middle of a solve."""

    def solve(self, weight: Tensor, *args: Any) -> Any:
        raise KeyboardInterrupt


# The same name everywhere: what fails must not be found out before.
_Interrupted.__name__ = _Calm.__name__


def rate_of_a_start(rank: int, size: int, counts: Sequence[int]) -> lorainit.LearningRate:
    """A learning rate from all processes' sequences, whoever has how many of them."""
    ids = torch.randint(0, 6, (sum(counts), 1), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids + torch.arange(10)]
    first = sum(counts[:rank])
    torch.manual_seed(100)
    model = tiny.start(tiny.llama(), lorainit.PiSSA())
    return lorainit.suggest_learning_rate(model, rows[first : first + counts[rank]], progress=False)


def rate_of_a_bad_sequence(rank: int, size: int) -> None:
    """A start with its rate, where one process has sequences whose loss is infinite."""

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[:, :-1].mT, ids[:, 1:], reduction="none"
        ).mean(1)
        return torch.where(ids[:, 0] == 0, torch.inf, losses)

    ids = 1 + torch.arange(10).repeat(8, 1)
    if rank == 1:
        ids[:, 0] = 0
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    tiny.start(tiny.llama(), lorainit.Vanilla(), data=rows, suggest_rate=True, loss_fn=loss_fn)


def matched_start(
    rank: int, size: int, counts: Sequence[int]
) -> tuple[dict[str, Tensor], int, float, lorainit.LearningRate]:
    """Factors, alpha and factor of a start that is told its rate."""
    ids = torch.randint(0, 6, (sum(counts), 1), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids + torch.arange(10)]
    first = sum(counts[:rank])
    torch.manual_seed(100)
    data = rows[first : first + counts[rank]]
    model = tiny.start(tiny.llama(), lorainit.PiSSA(), data=data, learning_rate=1e-4)
    config = model.peft_config["default"]
    return adapter(model), config.lora_alpha, config.origin.resized, config.origin.measured


def matched_shards(rank: int, size: int) -> dict[str, Any]:
    """An anchored adapter over shards, matched afterwards: its factors, and what the model computes."""
    model = get_peft_model(models.llama(), config())
    if size > 1:
        sharded(model)
    lorainit.get_peft_model(model, None, method=lorainit.PiSSA(), progress=False)
    lorainit.match_learning_rate(model, 1e-3, 1e-4)
    with torch.no_grad():
        logits = model(**batches(ROWS, 2)[0]).logits
    return {n: whole(p) for n, p in model.named_parameters() if "lora_" in n} | {"logits": logits}


def fitted_heads(
    rank: int, size: int, counts: Sequence[int], most: int = 60
) -> tuple[dict[str, Tensor], Any, float]:
    """A new head is fitted on all processes' sequences, whoever has how many of them; of three decays."""
    fit_heads.__kwdefaults__["decays"] = DECAYS[::5]
    rows = classifiers.labelled("classes", 60, 1)
    first = sum(counts[:rank])
    torch.manual_seed(100)
    model = lorainit.get_peft_model(
        classifiers.classifier(),
        classifiers.config(),
        method=lorainit.LoraOne(),
        data=rows[first : first + counts[rank]],
        max_sequences=most,
        progress=False,
    )
    origin = model.peft_config["default"].origin
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return trained, origin.heads, origin.measured["data_sequences"]
