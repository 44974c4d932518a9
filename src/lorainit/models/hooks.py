"""Hooks that go whatever happens, an interrupt right after their registration included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.utils.hooks import RemovableHandle

from lorainit.models.undo import surely


def add_hook(
    stack: ExitStack,
    register: Callable[..., RemovableHandle],
    hook: Callable[..., Any],
    **options: Any,
) -> None:
    """Register a hook that is removed when the stack is left.

    Its removal is noted before it is there: ``stack.callback(register(hook).remove)`` would leave it for
    good where an interrupt comes between the two.

    Args:
        stack: removes the hook when it is left.
        register: for example ``module.register_forward_hook``.
        hook: what to register.
        **options: for `register`.
    """
    made: list[RemovableHandle] = []
    stack.callback(surely, _remove, made)
    made.append(register(hook, **options))


def _remove(made: list[RemovableHandle]) -> None:
    for handle in made:
        handle.remove()
