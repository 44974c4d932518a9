"""Forward passes of a reference model that is the model itself, with its adapters switched off.

Preference losses compare a policy with a reference. Where no second model is held, the reference is the base
of the model that learns: the loss switches the adapter off, runs the model, and switches it on again. While
a start is measured, the policy is the base with a displacement on some layers, and the reference is the base
alone. These marks tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_inside: ContextVar[bool] = ContextVar("lorainit_reference_forward", default=False)


@contextmanager
def reference_forward() -> Iterator[None]:
    """What runs inside is the reference: nothing displaces it, and no statistic counts it."""
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def in_reference_forward() -> bool:
    """Whether the reference runs at present."""
    return _inside.get()
