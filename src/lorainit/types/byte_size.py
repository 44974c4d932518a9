"""Sizes in bytes, as numbers or as texts."""

from __future__ import annotations

import re

from lorainit.types.numbers import shown

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024 ** (power + 1) for power, unit in enumerate("kmgt")}


def parse_bytes(size: int | str | None, name: str = "max_memory") -> int | None:
    """Bytes from a number, or from a text like ``"24GiB"``, ``"500 MB"``; None stays None.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    if size is None:
        return None
    try:
        match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]i?)?b?\s*", str(size).lower())
        value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except (ValueError, OverflowError):
        value = 0
    if value < 1 or isinstance(size, bool):
        raise ValueError(
            f"{name} must be bytes, at least 1, or a text like '24GiB' or '500MB', got {shown(size)}"
        )
    return value
