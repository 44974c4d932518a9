"""Numbers that users give, checked where they enter: finite, in their range, and numbers at all."""

from __future__ import annotations

import math
from numbers import Integral, Real


def require_number(
    name: str,
    value: object,
    *,
    above: float = 0.0,
    inclusive: bool = True,
    below: float | None = None,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise unless `value` is a finite number at least (or above) one bound and below another.

    Args:
        name: of the setting, for the message.
        value: a real number; a bool or a text is none.
        above: the lower bound.
        inclusive: whether it may be the lower bound itself.
        below: the upper bound, which it may not be; None: there is none.
        error: what is raised.

    Raises:
        ValueError: or `error`, with the bound and the value.
    """
    if is_finite(value):
        number = float(value)  # type: ignore[arg-type]
        high_enough = number >= above if inclusive else number > above
        if high_enough and (below is None or number < below):
            return
    relation = "at least" if inclusive else "greater than"
    limit = "" if below is None else f" and below {below:g}"
    raise error(f"{name} must be a finite number {relation} {above:g}{limit}, got {shown(value)}")


def require_count(
    name: str,
    value: object,
    *,
    least: int = 1,
    most: int = 2**53,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` unless `value` is a whole number from `least` to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if whole and least <= int(value) <= most:  # type: ignore[call-overload]
        return
    raise error(f"{name} must be a whole number of at least {least}, got {shown(value)}")


def is_finite(value: object) -> bool:
    """Whether `value` is a real number that a float64 holds; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
