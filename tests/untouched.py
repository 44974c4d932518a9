"""What a failure, or a measurement, must leave alone: the model, and the random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def random_state() -> dict[str, Any]:
    algorithm, keys, *rest = numpy.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *rest),
    }


def _bits(parameter: nn.Parameter) -> bytes:
    values = parameter.detach().clone()
    if values.is_floating_point() and values.element_size() == 1:
        # NumPy has no floating numbers of eight bits.
        values = values.view(torch.uint8)
    return values.numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """By name, so that an assertion on two of them says what changed."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        # A method of its own on an instance is a kind of hook, too.
        found[f"module {name}"] = (id(module), type(module), plain, sorted(vars(module)))
        found[f"hooks {name}"] = {kind: list(getattr(module, kind)) for kind in HOOKS}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = parameter.grad
        found[f"parameter {name}"] = (
            id(parameter),
            parameter.requires_grad,
            parameter._version,
            _bits(parameter),
            None if grad is None else (id(grad), grad.clone().numpy().tobytes()),
        )
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = (id(buffer), buffer.clone().numpy().tobytes())
    config = getattr(model, "config", None)
    found["config"] = config.to_dict() if hasattr(config, "to_dict") else config
    found["peft"] = sorted(getattr(model, "peft_config", None) or {})
    return found


def unsettle(model: nn.Module) -> nn.Module:
    """Flags, modes and gradients that no code would set by chance."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 4 == 1:
            parameter.grad = torch.full_like(parameter, float(index))
    return model


@contextmanager
def untouched(model: nn.Module, *, rng: bool = True) -> Iterator[None]:
    """Assert that the model, and the random state, are at the end what they were at the start."""
    random.seed(11)
    numpy.random.seed(12)  # noqa: NPY002
    before, state = snapshot(model), random_state()
    yield
    after = snapshot(model)
    assert list(after) == list(before)
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, changed
    if rng:
        assert random_state() == state
