"""A device called "mps" on any machine: it computes on the CPU, and refuses float64 as Metal does.

Tensors on it wrap tensors of the CPU and say ``device.type == "mps"``, so the library takes the ways
that it takes there. A float64 tensor on it is an error, and so is an operation that mixes it with
tensors of the CPU. There is no autograd: use it under ``torch.no_grad()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # reads torch's names when it is first imported, before they are replaced
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MPS = torch.device("mps", 0)
_COPIES = {Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.__getitem__, Tensor.__setitem__}


class OnMps(Tensor):
    """A CPU tensor that says that it is on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnMps:
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64: MPS doesn't support float64")
        self = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=MPS)
        self.inner = inner
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} reached the wrapper itself")


class _Device(TorchFunctionMode):
    """What has no tensor of the device among its arguments: new ones, and copies to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    if isinstance(value, OnMps):
        return value.__dict__["inner"]
    return torch.device("cpu") if _is_mps(value) else value


def _is_mps(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "mps"
    return isinstance(value, str) and value.split(":")[0] == "mps"


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    here = [leaf for leaf in leaves if isinstance(leaf, OnMps)]
    named = [leaf for leaf in leaves if _is_mps(leaf)]
    with torch._C.DisableTorchFunction():
        if func.__name__ == "_parse_to" or not (here or named):
            return func(*args, **kwargs)
        if func is torch._has_compatible_shallow_copy_type:
            return len(here) == 2
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "device" and func.__name__ == "__get__":
            return MPS
        others = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, OnMps)]
        if here and func not in _COPIES and any(t.dim() for t in others):
            raise RuntimeError(f"{func}: tensors are on two devices, mps:0 and cpu")
        away = func is Tensor.cpu or (
            func is Tensor.to and not named and _names_cpu([*args[1:], *kwargs.values()])
        )
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func is Tensor.copy_ or (func.__name__.endswith("_") and out is _inner(args[0])):
            return args[0]
        if away:
            return out.clone()
        if isinstance(out, torch.Size):
            return out
        return tree_map(lambda x: OnMps(x) if isinstance(x, Tensor) else x, out)


def _names_cpu(values: list[Any]) -> bool:
    places = [v.device if type(v) is Tensor else v for v in values]
    return any(str(p) == "cpu" for p in places if isinstance(p, str | torch.device))


@contextmanager
def mps() -> Iterator[None]:
    """The device can be used inside."""
    with ExitStack() as stack:
        stack.enter_context(_Device())
        for name, stand_in in (
            ("get_rng_state", lambda: torch.get_rng_state()),
            ("set_rng_state", lambda state: torch.set_rng_state(state)),
        ):
            stack.enter_context(patch.object(torch.mps, name, stand_in))
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model on the device, in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnMps(parameter.detach().clone()), False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnMps(buffer.clone())
    return model
