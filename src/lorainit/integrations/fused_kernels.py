"""Fused LoRA kernels that read weights directly: while a model is measured, its layers are called one by one.

A kernel that computes several layers at once from their weights goes past the layers' own ``forward``, where
statistics are taken. axolotl hangs its kernels on the modules of a model: on ``mlp.forward``, and on the
``apply_qkv`` and ``apply_o`` that its attention calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from lorainit.errors import AdapterError

_KERNELS = "axolotl.kernels."


def _queries_keys_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = attention.k_proj(x)
    # Some models take their keys as values.
    values = keys if attention.v_proj is None else attention.v_proj(x)
    return attention.q_proj(x), keys, values


def _output(attention: Any, x: Tensor) -> Tensor:
    projected: Tensor = attention.o_proj(x)
    return projected


_ONE_BY_ONE: dict[str, Callable[..., Any]] = {"apply_qkv": _queries_keys_values, "apply_o": _output}


@contextmanager
def layers_called_one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside, no kernel of axolotl's stands in for layers of the model; afterwards they are back.

    Raises:
        AdapterError: a kernel that nothing is known to stand for, with the module's name.
    """
    fused = [
        (place, module, name, value)
        for place, module in model.named_modules()
        for name, value in vars(module).items()
        if str(getattr(getattr(value, "__func__", value), "__module__", "")).startswith(_KERNELS)
        and callable(value)
    ]
    for place, module, name, _ in fused:
        if name not in _ONE_BY_ONE and (name != "forward" or isinstance(module, nn.Embedding)):
            raise AdapterError(
                f"'{place}.{name}' is a fused kernel that reads weights past their layers, and is known in no "
                "other form: switch the lora_..._kernel options off, and start again."
            )
    try:
        for _, module, name, _ in fused:
            if name == "forward":
                del vars(module)[name]
            else:
                vars(module)[name] = MethodType(_ONE_BY_ONE[name], module)
        yield
    finally:
        for _, module, name, value in fused:
            vars(module)[name] = value
