"""The model as it was: gradients' flags, modes and the random state restored whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's generators of the CPU and of the model's device."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter and switch dropout off, and put everything back afterwards.

    The model goes to eval mode, but where its layers are gradient-checkpointed and it is in train
    mode: such layers must stay in train mode to be checkpointed at all, so their own dropout rates
    are set to zero for the time being.
    """
    required = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    checkpointed = [
        m for m, training in modes if training and getattr(m, "gradient_checkpointing", False)
    ]
    rates = [
        (m, key, value)
        for m in checkpointed
        for key, value in vars(m).items()
        if isinstance(value, float)
        and ("dropout" in key or "drop_prob" in key or "layerdrop" in key)
    ]
    handles = [_inputs_require_grad(model)] if checkpointed else []
    try:
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for module, _ in modes:
            module.training = False
        for module in checkpointed:
            module.training = True
        for module, key, _ in rates:
            setattr(module, key, 0.0)
        yield
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()
        for module, key, value in rates:
            setattr(module, key, value)
        for module, training in modes:
            module.training = training
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def _inputs_require_grad(model: nn.Module) -> torch.utils.hooks.RemovableHandle | None:
    """Reentrant checkpointing drops the graph unless what goes into a block requires a gradient."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Module):
        return None

    def hook(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_leaf and output.is_floating_point():
            output.requires_grad_(True)

    return embedding.register_forward_hook(hook)
