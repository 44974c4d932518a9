"""The weight of an anchored factor as a tensor: what is read joins its halves, what is written is split.

The halves are stored apart: one is an ordinary parameter, which optimizers, DDP and FSDP hold, and the
other is frozen. PEFT, and the tools around it, know one weight of twice the rank. `FactorWeight` is that
weight. It stores nothing: every operation on it is done on the halves, joined at that moment, and what the
operation changed in place is written back. Views of it (``weight.data``, ``weight[:r]``, ``weight.T``) are
of this kind too, and so is its gradient.

Limits: what reads memory addresses sees a copy; NumPy arrays made of it are read-only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

_OF_SHARDED_TENSORS = {"device_mesh", "placements", "full_tensor", "to_local", "redistribute"}


class Source(Protocol):
    """Two halves that are stored apart."""

    def joined(self) -> Tensor:
        """A new tensor of both halves, connected with the trained half's graph."""

    def write(self, whole: Tensor) -> None:
        """Copy the parts of `whole` into the halves."""


class Halves(Source, Protocol):
    """The halves of a weight, of which one is a parameter."""

    @property
    def trained(self) -> Tensor:
        """The half that is a parameter."""

    def join(self, trained: Tensor, frozen: Tensor) -> Tensor:
        """Both in one tensor."""

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`."""

    def replace(self, whole: Tensor) -> None:
        """What ``weight.data = whole`` does."""

    def copy_trained(self, value: Tensor) -> bool:
        """Copy into the trained half alone, where `value` is one for it; whether it was."""


@dataclass(frozen=True)
class _Gradient:
    """The gradient of a weight: the trained half's, and zeros."""

    of: Halves

    def joined(self) -> Tensor:
        grad = self._own()
        return self.of.join(grad, torch.zeros_like(grad))

    def write(self, whole: Tensor) -> None:
        with torch.no_grad():
            self._own().copy_(self.of.split(whole)[0])

    def _own(self) -> Tensor:
        grad = self.of.trained.grad
        if grad is None:
            raise RuntimeError("the gradient of this factor was set to None after it was read.")
        return grad


@dataclass(frozen=True)
class _View:
    """How a view was made of another `FactorWeight`."""

    of: FactorWeight
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None

    def replayed(self) -> tuple[Tensor, Tensor]:
        whole, tensor = self.of.read()
        args, kwargs = _replaced(
            (self.args, self.kwargs), lambda w: tensor if w is self.of else w.read()[1]
        )
        out = self.func(*args, **kwargs)
        return whole, out if self.index is None else out[self.index]


class _Connected(torch.autograd.Function):
    """Gives a `FactorWeight` the graph that custom autograd functions, such as fused kernels, go by."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, halves: Halves, shape: torch.Size) -> FactorWeight:
        ctx.halves = halves
        return FactorWeight(halves, shape, trained)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.halves.split(grad)[0], None, None


def weight_of(halves: Halves, shape: torch.Size) -> FactorWeight:
    """Two halves as one weight of this shape."""
    trained = halves.trained
    if torch.is_grad_enabled() and trained.requires_grad:
        found: FactorWeight = _Connected.apply(trained, halves, shape)  # type: ignore[no-untyped-call]
        return found
    return FactorWeight(halves, shape, trained)


class FactorWeight(torch.Tensor):
    """Two halves as one tensor, or a view of it; see the module."""

    __slots__ = ("_is_param", "_source", "_view")  # swap_tensors refuses what has other slots

    _source: Source
    _view: _View | None
    _is_param: bool

    @staticmethod
    def __new__(
        cls, source: Source, shape: torch.Size, like: Tensor, view: _View | None = None
    ) -> FactorWeight:
        """Of this shape, with the dtype and on the device of `like`."""
        new: FactorWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        new._source, new._view = source, view
        # Read by isinstance(weight, nn.Parameter), and so by nn.Module.get_parameter.
        new._is_param = view is None and hasattr(source, "trained")
        return new

    def read(self) -> tuple[Tensor, Tensor]:
        """The whole weight as it is now, and this part of it, which shares its memory."""
        if self._view is not None:
            return self._view.replayed()
        whole = self._source.joined()
        return whole, whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own = _OWN.get(func)
        found = NotImplemented if own is None else own(*args, **kwargs)
        return _through(func, args, kwargs) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _through(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """What only a sharded tensor has, where the halves are sharded."""
        if name in _OF_SHARDED_TENSORS:
            return getattr(self.read()[1], name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def _through(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function on the joined halves, and write back what it changed."""
    read: dict[int, tuple[FactorWeight, Tensor, Tensor]] = {}

    def joined(weight: FactorWeight) -> Tensor:
        if id(weight) not in read:
            with torch.inference_mode(False):  # inference tensors count no versions
                read[id(weight)] = (weight, *weight.read())
        return read[id(weight)][2]

    new_args, new_kwargs = _replaced((args, kwargs), joined)
    versions = {key: tensor._version for key, (_, _, tensor) in read.items()}
    out = func(*new_args, **new_kwargs)
    for key, (weight, whole, tensor) in read.items():
        if tensor._version != versions[key]:
            weight._source.write(whole)
    for weight, whole, tensor in read.values():

        def linked(part: Tensor, index: int | None, weight: FactorWeight = weight) -> FactorWeight:
            view = _View(weight, func, args, kwargs, index)
            return FactorWeight(weight._source, part.shape, part, view)

        if out is tensor:
            return weight
        if _shares_memory(out, whole):
            return linked(out, None)
        if isinstance(out, tuple | list) and any(_shares_memory(part, whole) for part in out):
            return type(out)(linked(part, index) for index, part in enumerate(out))
    if isinstance(out, np.ndarray):
        out.setflags(write=False)
    return out


def _replaced(value: Any, by: Callable[[FactorWeight], Tensor]) -> Any:
    """A value with every `FactorWeight` in it replaced."""
    if isinstance(value, FactorWeight):
        return by(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(part, by) for part in value)
    if type(value) is dict:
        return {key: _replaced(part, by) for key, part in value.items()}
    return value


def _shares_memory(first: Any, second: Tensor) -> bool:
    if not isinstance(first, Tensor):
        return False
    try:
        return _storage(first) == _storage(second)
    except (NotImplementedError, RuntimeError):
        return False  # traced, batched or fake: there is nothing to write into


def _storage(tensor: Tensor) -> int:
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return int(local.untyped_storage()._cdata)


def _halves(weight: FactorWeight) -> Halves | None:
    """The halves of a whole weight; None for views and gradients."""
    return weight._source if weight._is_param else None  # type: ignore[return-value]


def _requires_grad(weight: FactorWeight) -> Any:
    halves = _halves(weight)
    return NotImplemented if halves is None else halves.trained.requires_grad


def _set_requires_grad(weight: FactorWeight, flag: bool = True) -> Any:
    halves = _halves(weight)
    if halves is None:
        return NotImplemented
    halves.trained.requires_grad_(flag)
    return weight


def _gradient(weight: FactorWeight) -> Any:
    halves = _halves(weight)
    if halves is None:
        return NotImplemented
    grad = halves.trained.grad
    return None if grad is None else FactorWeight(_Gradient(halves), weight.shape, grad)


def _set_gradient(weight: FactorWeight, grad: Tensor | None) -> Any:
    halves = _halves(weight)
    if halves is None:
        return NotImplemented
    halves.trained.grad = None if grad is None else halves.split(grad)[0].clone()
    return None


def _set_data(weight: FactorWeight, value: Tensor) -> Any:
    halves = _halves(weight)
    if halves is None:
        return NotImplemented
    halves.replace(_replaced(value, lambda w: w.read()[1]))
    return None


def _copy(weight: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, FactorWeight) or not hasattr(weight._source, "copy_trained"):
        return NotImplemented
    value = _replaced(value, lambda w: w.read()[1])
    return weight if weight._source.copy_trained(value) else NotImplemented


def _deepcopy(weight: FactorWeight, memo: dict[int, Any]) -> Tensor:
    """An independent tensor, a parameter where this stands for one."""
    halves = _halves(weight)
    new: Tensor = weight.read()[1].detach().clone()
    if halves is not None:
        new = nn.Parameter(new, halves.trained.requires_grad)
    memo[id(weight)] = new
    return new


def _reduce(weight: FactorWeight, protocol: int) -> Any:
    return weight.read()[1].detach().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _rows(weight: FactorWeight) -> Any:
    return iter(weight.unbind(0))


def _refuse_hook(weight: FactorWeight, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "this weight is two halves, of which one is trained; a hook on it would not be called. Register "
        "it on the trained half: the parameter of the same name in model.named_parameters()."
    )


_METADATA = {
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
}

_OWN: dict[Any, Callable[..., Any]] = {
    torch.Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__set__: _set_requires_grad,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.Tensor.grad.__get__: _gradient,  # type: ignore[union-attr]
    torch.Tensor.grad.__set__: _set_gradient,  # type: ignore[union-attr]
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.copy_: _copy,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.__reduce_ex__: _reduce,
    torch.Tensor.__iter__: _rows,
    torch.Tensor.register_hook: _refuse_hook,
    torch.Tensor.register_post_accumulate_grad_hook: _refuse_hook,
}
