"""Models whose parameters DeepSpeed's ZeRO-3 has partitioned: each process holds a part of every one.

Between uses such a parameter has no entries; DeepSpeed gathers it while its module runs, and
``deepspeed.zero.GatheredParameters`` wherever else it is wanted. Every function is a collective.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_held: Counter[int] = Counter()
"""Parameters inside `whole`, by DeepSpeed's number: nothing else partitions them meanwhile."""

_HOOKS = "deepspeed.runtime.zero"


def is_partitioned(value: object) -> bool:
    """Whether a tensor is a parameter that ZeRO-3 has partitioned."""
    return isinstance(value, Tensor) and hasattr(value, "ds_id")


def has_partitioned(model: nn.Module) -> bool:
    """Whether any parameter of a model is partitioned."""
    # Nothing is partitioned before this has been imported.
    return "deepspeed" in sys.modules and any(map(is_partitioned, model.parameters()))


@contextmanager
def whole(parameters: Iterable[Tensor], *, written: bool = False) -> Iterator[None]:
    """Inside, these parameters have their entries on every process.

    Args:
        parameters: those that are not partitioned are left alone.
        written: the block writes into them, the same on every process; their parts are renewed at its end.
    """
    found = [p for p in parameters if is_partitioned(p) and not _held[_number(p)]]
    if not found:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    numbers = {_number(p) for p in found}
    with GatheredParameters(found, modifier_rank=0 if written else None):
        _held.update(numbers)
        try:
            yield
        finally:
            _held.subtract(numbers)


def partition_again(model: nn.Module) -> None:
    """Free what was gathered and not given back: after an error, or where no backward came."""
    for parameter in model.parameters():
        if not is_partitioned(parameter) or _held[_number(parameter)]:
            continue
        state: Any = parameter
        if state.ds_status.name == "AVAILABLE" and not getattr(state, "ds_persist", False):
            state.partition()


@contextmanager
def gathered_while_running(model: nn.Module) -> Iterator[None]:
    """Have DeepSpeed gather the parameters of each module while it runs, forward and backward.

    An engine has seen to that already; a model that was loaded under ``deepspeed.zero.Init`` and has no engine
    yet gets DeepSpeed's own hooks for the time being. Modules with parameters of their own that are not
    partitioned, such as an adapter, stay as they are.
    """
    if not has_partitioned(model) or _has_hooks(model):
        yield
        return
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils.timer import NoopTimer

    containers = {module: module._parameters for module in model.modules()}
    ordinary = _ordinary_parts(model)
    for parent, name, _ in ordinary:
        del parent._modules[name]
    try:
        # A small parameter that stayed gathered would stay so for the user's engine, too.
        hooks = parameter_offload.DeepSpeedZeRoOffload(
            model, NoopTimer(), None, param_persistence_threshold=0
        )
    finally:
        for parent, modules in {id(p): (p, dict(o)) for p, _, o in ordinary}.values():
            parent._modules = modules
    try:
        yield
    finally:
        hooks.destroy()
        partition_again(model)
        stack = parameter_offload.FWD_MODULE_STACK
        if stack and stack[-1] is model:
            stack.pop()
        for module, held in containers.items():
            # Its own dictionary knows the module and would gather what is read of it.
            module._parameters = held


def _has_hooks(model: nn.Module) -> bool:
    return any(
        str(getattr(hook, "__module__", "")).startswith(_HOOKS)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def _ordinary_parts(model: nn.Module) -> list[tuple[nn.Module, str, dict[str, Any]]]:
    """The outermost modules whose parameters are all whole: parent, name in it, and the parent's children."""
    found = []
    for parent in model.modules():
        children = dict(parent._modules)
        for name, child in children.items():
            own = [] if child is None else list(child.parameters())
            around = any(map(is_partitioned, parent.parameters()))
            if around and own and not any(map(is_partitioned, own)):
                found.append((parent, name, children))
    return found


def _number(parameter: Any) -> int:
    return int(parameter.ds_id)
