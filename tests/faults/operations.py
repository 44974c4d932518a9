"""What is disturbed at every call site, and what must hold afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import lorainit
from lorainit.files.aside import is_aside
from tests.adapters import tiny
from tests.faults.call_sites import Injected, InjectedInterrupt, calls, raising

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Operation:
    """Something of the package's API.

    Attributes:
        model: it works on; the same one every time, since it is left as it was.
        work: with the model and a folder.
        undo: after it has succeeded, or been disturbed after its last deed.
    """

    model: Any
    work: Callable[[Any, Path], object]
    undo: Callable[[Any], None] = field(default=lambda model: None)


def data() -> list[dict[str, Tensor]]:
    return [tiny.batch(4, 6, seed=s) for s in range(2)]


def operations(folder: Path) -> dict[str, Operation]:
    """By name; the folder holds what some of them read."""
    base = tiny.llama()
    second = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    again = lorainit.get_peft_model(
        tiny.llama(), tiny.config(), method=lorainit.PiSSA(), progress=False
    )
    tiny.train(again)
    anchored = again
    needs = lorainit.Natural().needs
    statistics = lorainit.collect_statistics(
        tiny.llama(), tiny.config(), data=data(), needs=needs, progress=False
    )
    statistics.save(folder / "s.safetensors")
    lorainit.save_adapter(anchored, folder / "adapter")

    def get(model: Any, **settings: Any) -> None:
        settings = {"method": lorainit.LoraDA(), "data": data()} | settings
        lorainit.get_peft_model(
            model, settings.pop("config", tiny.config()), progress=False, **settings
        )

    def unload(model: Any) -> None:
        """A base model that was wrapped is unwrapped by taking its layers out again."""
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if isinstance(child, nn.Module) and hasattr(child, "base_layer"):
                    module._modules[name] = child.base_layer
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(name, None)
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def delete(model: PeftModel) -> None:
        if "other" in model.peft_config:
            model.delete_adapter("other")

    return {
        "collect_statistics": Operation(
            tiny.llama(),
            lambda model, _: lorainit.collect_statistics(
                model, tiny.config(), data=data(), needs=needs, progress=False
            ),
        ),
        "get_peft_model, new": Operation(base, lambda model, _: get(model), unload),
        "get_peft_model, second": Operation(
            second, lambda model, _: get(model, adapter_name="other"), delete
        ),
        "get_peft_model, restarted": Operation(
            again, lambda model, _: get(model, config=None, method=lorainit.EVA(rho=1))
        ),
        "load_adapter": Operation(
            tiny.llama(),
            lambda model, place: lorainit.load_adapter(model, folder / "adapter"),
            unload,
        ),
        "save": Operation(statistics, lambda held, place: held.save(place / "t.safetensors")),
        "load": Operation(
            None, lambda _, place: lorainit.Statistics.load(folder / "s.safetensors")
        ),
        "save_adapter": Operation(
            anchored, lambda model, place: lorainit.save_adapter(model, place / "a")
        ),
        "export": Operation(
            anchored, lambda model, place: lorainit.export(model, place / "a", rank=2)
        ),
    }


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that a failure must leave alone."""
    found: dict[str, Any] = {"rng": torch.get_rng_state(), "python": random.getstate()}
    if not isinstance(model, nn.Module):
        return found
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found["tensor " + name] = (tensor.detach().clone(), tensor.requires_grad)
        found["gradient " + name] = tensor.grad is None
    for name, module in model.named_modules():
        found["module " + name] = (type(module).__name__, module.training)
        for hooks in HOOKS:
            table = getattr(module, hooks, None)
            found[f"{hooks} {name}"] = len(table) if table else 0
        for key in ("r", "lora_alpha", "scaling"):
            if isinstance(getattr(module, key, None), dict):
                found[f"{key} {name}"] = dict(getattr(module, key))
    if isinstance(model, PeftModel):
        found["configs"] = {n: (c.r, c.lora_alpha) for n, c in model.peft_config.items()}
        found["active"] = list(model.active_adapters)
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of what is not the same to the bit."""
    return [k for k in {**first, **second} if not _same(first.get(k), second.get(k))]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


@dataclass
class Tally:
    """What was injected, and what did not hold."""

    injected: int = 0
    passed_over: int = 0
    sites: int = 0
    broken: list[str] = field(default_factory=list)


def disturb(
    name: str, operation: Operation, place: Path, *, most: int | None, seed: int = 0
) -> Tally:
    """Raise at call sites of one operation: first, last and a random call of each; check what is left.

    Args:
        name: of the operation.
        operation: what is done.
        place: an empty folder for its files.
        most: sites to take, drawn at random; None: all.
        seed: of the draw.
    """
    tally = Tally()
    draw = random.Random(seed)

    def work() -> None:
        operation.work(operation.model, place)

    kept = state_of(operation.model)
    counted = calls(work)
    _settle(operation, kept)
    sites = sorted(counted)
    tally.sites = len(sites)
    if most is not None and len(sites) > most:
        sites = sorted(draw.sample(sites, most))
    files = {p.name for p in place.iterdir()}
    for site in sites:
        for number in sorted({1, counted[site], draw.randint(1, counted[site])}):
            error = Injected if draw.random() < 0.7 else InjectedInterrupt
            before = state_of(operation.model)
            caught = raising(work, site, number, error)
            where = f"{name}: {site[0]}:{site[1]}, call {number} of {counted[site]}"
            if caught is None:
                # Caught where that is promised (an optional part), or not reached again.
                tally.passed_over += 1
                _settle(operation, before)
                continue
            tally.injected += 1
            broken = differences(before, state_of(operation.model))
            broken += _left_behind(place, files, caught)
            if broken:
                tally.broken.append(f"{where} ({type(caught).__name__}): {broken[:3]}")
                _settle(operation, before)
    return tally


def _left_behind(place: Path, files: set[str], caught: BaseException) -> list[str]:
    there = {p.name for p in place.iterdir()}
    found = [n for n in there - files if not is_aside(n)]
    if isinstance(caught, Injected):
        found += [n for p in place.rglob("*") if is_aside(n := p.name)]
    return found


def _settle(operation: Operation, state: dict[str, Any]) -> None:
    """Bring the model back after a success, or after what was found broken."""
    operation.undo(operation.model)
    model = operation.model
    if isinstance(model, nn.Module):
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                kept = state.get("tensor " + name)
                if kept is not None and kept[0].shape == tensor.shape:
                    tensor.copy_(kept[0])
                    tensor.requires_grad_(kept[1])
    torch.set_rng_state(state["rng"])
    random.setstate(state["python"])
