"""The model as it was: gradients' flags, modes and the random state restored whatever happens."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorainit.models.hooks import add_hook
from lorainit.models.packed_layers import unpacked
from lorainit.models.resident import fetched_again
from lorainit.models.undo import surely
from lorainit.parallel.partitioned import gathered_while_running
from lorainit.parallel.sharding import reshard

P = ParamSpec("P")
R = TypeVar("R")

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


_eager_lock = threading.Lock()
_eager_users: set[object] = set()
_eager_stance: list[Any] = []


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled models run eagerly; the stance is one for all threads, so the last to leave restores it."""
    user = object()
    with ExitStack() as stack:
        stack.callback(surely, _leave_eager, user)
        _enter_eager(user)
        yield


def _enter_eager(user: object) -> None:
    with _eager_lock:
        _eager_users.add(user)
        if _eager_stance:
            return
        change: Any = None
        try:
            # Made and set at once.
            change = torch.compiler.set_stance("force_eager")
            _eager_stance.append(change)
        except BaseException:
            if change is not None:
                surely(change.__exit__, None, None, None)
            raise


def _leave_eager(user: object) -> None:
    with _eager_lock:
        _eager_users.discard(user)
        if not _eager_users and _eager_stance:
            _eager_stance[0].__exit__(None, None, None)
            _eager_stance.clear()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Threads that work on one model take turns: each changes its flags and hooks for a while.

    A PeftModel and its base model are one model.
    """
    base = model
    while isinstance(inner := getattr(base, "base_model", None), nn.Module) and hasattr(
        base, "peft_config"
    ):
        inside: nn.Module = getattr(inner, "model", inner)
        if inside is base:
            # Some models of transformers are their own base model.
            break
        base = inside
    with _locks_lock:
        lock = _locks.setdefault(base, threading.RLock())
    with lock:
        yield


@contextmanager
def unchanged_rng(device: torch.device) -> Iterator[None]:
    """Restore the generators of torch (on the CPU and the model's device), NumPy and Python."""
    with ExitStack() as stack:
        stack.callback(surely, _random_state(device))
        yield


@contextmanager
def unchanged_rng_on_error(device: torch.device) -> Iterator[None]:
    """The same, only where the work fails: what succeeds may have drawn."""
    restore = _random_state(device)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextmanager
def unchanged_generators(data: object) -> Iterator[None]:
    """Restore the generators that a loader draws its order from: it gives that order again."""
    found: dict[int, torch.Generator] = {}
    places = [data]
    for place in places:
        generator = getattr(place, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        if len(places) < 8:
            parts = (getattr(place, name, None) for name in ("batch_sampler", "sampler"))
            places += [part for part in parts if part is not None and part is not place]
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _random_state(device: torch.device) -> Callable[[], None]:
    """What puts every generator back to where it is now."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    cpu_state = torch.get_rng_state()
    own = None
    if device.type not in ("cpu", "meta"):
        own = torch.get_device_module(device)
        # MPS has one generator, and no argument for it.
        place = () if device.type == "mps" else (device,)
        device_state = own.get_rng_state(*place)

    def restore() -> None:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if own is not None:
            own.set_rng_state(device_state, *place)

    return restore


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function without whatever autocast is on where it is called."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return called


@contextmanager
def measuring(model: nn.Module, *, checkpoints: bool = True) -> Iterator[None]:
    """Freeze every parameter and switch dropout off, and put everything back afterwards.

    The model goes to eval mode, but where its layers are gradient-checkpointed and it is in train
    mode: such layers must stay in train mode to be checkpointed at all, so their own dropout rates
    are set to zero for the time being. What is compiled of it runs eagerly, where hooks are seen.
    Without `checkpoints` all of it goes to eval mode: nothing is checkpointed. A graph keeps no
    offloaded weights on the device, and four-bit layers are not packed for inference.
    """
    reshard(model)
    required = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    checkpointed = [
        m
        for m, training in modes
        if checkpoints and training and getattr(m, "gradient_checkpointing", False)
    ]
    rates = [
        (m, key, value)
        for m in checkpointed
        for key, value in vars(m).items()
        if isinstance(value, float)
        and ("dropout" in key or "drop_prob" in key or "layerdrop" in key)
    ]
    with ExitStack() as stack:
        stack.callback(surely, _put_back_buffers, _buffers_of(model))
        stack.callback(surely, _put_back, required, modes, rates)
        stack.callback(reshard, model)
        stack.enter_context(gathered_while_running(model))
        stack.enter_context(fetched_again(model))
        stack.enter_context(unpacked(model))
        if "torch._dynamo" in sys.modules:
            # Nothing can be compiled where it was not loaded.
            stack.enter_context(_eager())
        if checkpointed:
            _inputs_require_grad(model, stack)
        for parameter, _ in required:
            parameter.requires_grad_(False)
        for module, _ in modes:
            module.training = False
        for module in checkpointed:
            module.training = True
        for module, key, _ in rates:
            setattr(module, key, 0.0)
        yield


_LARGEST_BUFFER = 1 << 20
"""Numbers; larger buffers hold weights, which no forward pass writes, and are not copied."""


def _buffers_of(model: nn.Module) -> list[tuple[nn.Module, str, Tensor | None, Tensor | None]]:
    """Every buffer, and a copy of the small ones: some layers write theirs in the forward pass."""
    return [
        (
            module,
            name,
            buffer,
            None if buffer is None or _is_large(buffer) else buffer.detach().clone(),
        )
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]


def _is_large(buffer: Tensor) -> bool:
    return buffer.is_meta or buffer.numel() > _LARGEST_BUFFER


def _put_back_buffers(
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]],
) -> None:
    with torch.no_grad():
        for module, name, buffer, copy in buffers:
            if copy is not None and buffer is not None and not _same_bits(buffer, copy):
                buffer.copy_(copy)
            module._buffers[name] = buffer


def _same_bits(first: Tensor, second: Tensor) -> bool:
    # Only what was written is written back: NaN counts as changed.
    return bool(torch.equal(first, second))


def _put_back(
    required: list[tuple[nn.Parameter, bool]],
    modes: list[tuple[nn.Module, bool]],
    rates: list[tuple[nn.Module, str, float]],
) -> None:
    for module, key, value in rates:
        setattr(module, key, value)
    for module, training in modes:
        module.training = training
    for parameter, flag in required:
        parameter.requires_grad_(flag)


def _inputs_require_grad(model: nn.Module, stack: ExitStack) -> None:
    """Reentrant checkpointing drops the graph unless what goes into a block requires a gradient.

    Every part with embeddings of its own gets the hook: an encoder's may be convolutions.
    """

    def hook(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_leaf and output.is_floating_point():
            output.requires_grad_(True)

    embeddings: dict[int, nn.Module] = {}
    for part in model.modules():
        get = getattr(part, "get_input_embeddings", None)
        try:
            embedding = get() if callable(get) else None
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, nn.Module):
            embeddings[id(embedding)] = embedding
    for embedding in embeddings.values():
        add_hook(stack, embedding.register_forward_hook, hook)
