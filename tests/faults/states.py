"""What a model, the process and a folder are, to the bit, before and after something failed."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lorainit.files.aside import is_aside

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(model: Any) -> dict[str, Any]:
    """Everything of a model that a failure must leave alone."""
    found: dict[str, Any] = {"rng": torch.get_rng_state(), "python": random.getstate()}
    log = logging.getLogger("lorainit")
    found["log"] = (log.level, len(log.handlers))
    found["grad"] = torch.is_grad_enabled()
    found["stance"] = torch._dynamo.eval_frame._stance.stance
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


def content_of(place: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name, those written aside left out."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not any(is_aside(part) for part in path.relative_to(place).parts)
    }


def left_aside(place: Path) -> list[str]:
    """Names of what was written aside and left below a folder."""
    return [path.name for path in place.rglob("*") if is_aside(path.name)]
