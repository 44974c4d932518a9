"""Checks that the settings of several methods share, run at construction."""

from __future__ import annotations

import math
from typing import get_args

from lorainit.types import DampingMode

TRUST_REGION = 0.25
"""Where a length is measured, no layer moves by more of its weight's norm. A loss that starts far above that
of a guess can be lowered by wrecking the model, and what is wrecked does not train (docs/natural.md)."""

ROW_NORM = 3**-0.5
"""Expected norm of a row of ``A`` as LoRA draws it: uniform in ``+-1/sqrt(in)``, ``in`` entries."""


def require_number(name: str, value: float, *, above: float = 0.0, inclusive: bool = True) -> None:
    """Raise ValueError unless `value` is finite and at least (or above) the bound."""
    good = math.isfinite(value) and (value >= above if inclusive else value > above)
    if not good:
        relation = "at least" if inclusive else "greater than"
        raise ValueError(f"{name} must be a finite number {relation} {above:g}, got {value!r}")


def require_whole(name: str, value: int, least: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number, and at least `least`."""
    if not isinstance(value, int) or (least is not None and value < least):
        bound = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require_damping(damping: float, mode: str) -> None:
    """Raise ValueError unless damping and its mode are usable."""
    require_number("damping", damping)
    require_choice("damping_mode", mode, get_args(DampingMode))
