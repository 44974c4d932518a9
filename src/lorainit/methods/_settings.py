"""Checks that the settings of several methods share, run at construction."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args

from lorainit.types import DampingMode
from lorainit.types.numbers import require_number as require_number
from lorainit.types.numbers import shown

TRUST_REGION = 0.25
"""Where a length is measured, no layer moves by more of its weight's norm. A loss that starts far above that
of a guess can be lowered by wrecking the model, and what is wrecked does not train (docs/natural.md)."""

ROW_NORM = 3**-0.5
"""Expected norm of a row of ``A`` as LoRA draws it: uniform in ``+-1/sqrt(in)``, ``in`` entries."""


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require_damping(damping: float, mode: str) -> None:
    """Raise ValueError unless damping and its mode are usable."""
    require_number("damping", damping)
    require_choice("damping_mode", mode, get_args(DampingMode))


def require_types(method: Any) -> None:
    """Raise ValueError unless every field holds a value of its annotation's type.

    A whole number serves as a float; a bool is no number. Choices and ranges are checked elsewhere.
    """
    for name, kinds in _kinds(method.__class__).items():
        value = getattr(method, name)
        known = tuple(_AS.get(k, k) for k in kinds)
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, known):
            wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{name} must be a value of type {wanted}, got {shown(value)}")


_AS: dict[type, type] = {float: Real, int: Integral}
"""NumPy's numbers are numbers too."""


@cache
def _kinds(kind: Any) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(kind)
    return {f.name: _classes(hints[f.name]) for f in dataclasses.fields(kind)}


def _classes(hint: Any) -> tuple[type, ...]:
    """The classes of ``float``, ``float | None``, ``Literal["a", "b"]``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in get_args(hint) for kind in _classes(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(choice) for choice in get_args(hint)})
    return (typing.get_origin(hint) or hint,)
